"""`pytorch_model.bin`, single or sharded: what `torch.save` writes, read without running anything in it.

`torch.load(weights_only=True)` refuses every call that does not rebuild a tensor. Zip files (torch 1.6 on) are mapped:
only what is copied out is read. Older files cannot be mapped and stand in memory whole, one at a time.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from loftq_cli.checkpoint.base import SideFile, TensorInfo, fingerprint
from loftq_cli.checkpoint.local import CONFIG_HINT, check_file, collect, find_files, read_index, read_json
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.errors import LoftqError
from loftq_cli.tensorfile.dtypes import SAFETENSORS_NAMES

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
SHARDS = "pytorch_model-*.bin"
_NESTED = ("state_dict", "model", "module")
_RESIDENT = 256 << 20
_REPEATED = 64 << 20  # a view may repeat its elements; a hostile one could do so without end


class TensorReader(Protocol):
    """Tensors of pickled files, by file and name; `checkpoint.remote_pickled` has one for files on the Hub."""

    def infos(self, file: str) -> list[TensorInfo]:
        """The tensors of one file, in the order in which safetensors would store them; second views of a tensor last.

        Raises:
            LoftqError: the file is damaged, wants to run code, or holds tensors of an unknown kind.
        """

    def copy(self, file: str, name: str, target: Tensor) -> None:
        """Copy one tensor into `target`, of its shape."""

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""

    def row(self, file: str, name: str, index: int) -> Tensor:
        """One row of a matrix, or one entry of any tensor's first dimension."""

    def cancel(self) -> None:
        """See `checkpoint.base.Checkpoint.cancel`."""

    def close(self) -> None:
        """Give memory back."""


@dataclass(frozen=True)
class PickleReader:
    """Implements `TensorReader` for files in a directory, in bounded memory.

    Attributes:
        resident: bytes of one file that may be read before its map is given back and made anew (a few milliseconds):
            pages of a map count as this process's memory until then.
        unmapped: how many files of the old kind may stand in memory at once.
    """

    directory: Path
    resident: int = _RESIDENT
    unmapped: int = 1
    _states: dict[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _touched: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def infos(self, file: str) -> list[TensorInfo]:
        state = self._state(file)
        first = min((tensor.data_ptr() for tensor in state.values() if tensor.numel()), default=0)
        found = [state_info(file, name, tensor, -1 - i, first) for i, (name, tensor) in enumerate(state.items())]
        if is_mapped(self.directory / file):
            self.forget(file)
        return in_order(found)

    def copy(self, file: str, name: str, target: Tensor) -> None:
        source = self._state(file)[name]
        target.copy_(source)
        touched = source.numel() * source.element_size()
        del source
        self._touch(file, touched)

    def _touch(self, file: str, nbytes: int) -> None:
        """Give a map back when enough of it has been read."""
        touched = self._touched[file] = self._touched.get(file, 0) + nbytes
        if touched > self.resident and is_mapped(self.directory / file):
            self.forget(file)

    def row(self, file: str, name: str, index: int) -> Tensor:
        found = self._state(file)[name][index].clone()
        self._touch(file, found.nbytes)
        return found

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        return tuple(self._state(file)[name].shape)

    def forget(self, file: str) -> None:
        """Give the file's map, or its memory, back."""
        self._states.pop(file, None)
        self._touched.pop(file, None)

    def cancel(self) -> None:
        """Nothing waits for a network."""

    def close(self) -> None:
        self._states.clear()
        self._touched.clear()

    def _state(self, file: str) -> Mapping[str, Tensor]:
        if file not in self._states:
            whole = [name for name in self._states if not is_mapped(self.directory / name)]
            if len(whole) >= self.unmapped and not is_mapped(self.directory / file):
                self.forget(whole[0])
            self._states[file] = load_state(self.directory / file)
        return self._states[file]


@dataclass(frozen=True)
class PickledCheckpoint:
    """Implements `checkpoint.base.Checkpoint` over a reader."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    fingerprint: str
    reader: TensorReader

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.reader.copy(info.file, name, tensor)
        return tensor

    def read_piece(self, name: str, index: int) -> Tensor:
        return self.reader.row(self.tensors[name].file, name, index)

    def side_files(self) -> tuple[SideFile, ...]:
        return find_side_files(self.path)

    def cancel(self) -> None:
        self.reader.cancel()

    def close(self) -> None:
        self.reader.close()


def has_pickles(directory: Path) -> bool:
    """Whether there is something for `open_pickled`."""
    return any((directory / name).is_file() for name in (INDEX, SINGLE)) or any(directory.glob(SHARDS))


def open_pickled(directory: Path) -> PickledCheckpoint:
    """Read config.json, the index and every shard's list of tensors.

    Raises:
        LoftqError: a file is missing, damaged or wants to run code, or index and shards contradict each other.
    """
    sharded = not (directory / SINGLE).exists() and (directory / INDEX).exists()  # transformers prefers the single file
    index = read_index(directory / INDEX, ".bin") if sharded else None
    files = find_files(directory, SINGLE, SHARDS) if index is None else sorted(set(index.values()))
    return read_lists(directory, files, index, PickleReader(directory))


def read_lists(
    directory: Path, files: Iterable[str], index: Mapping[str, str] | None, reader: TensorReader
) -> PickledCheckpoint:
    """The checkpoint in `files`, wherever `reader` reads them; `directory` holds config.json.

    Raises:
        LoftqError: as `open_pickled`.
    """
    config = read_json(directory / "config.json", CONFIG_HINT)
    tensors = collect(directory / INDEX, index, (info for file in files for info in reader.infos(file)))
    return PickledCheckpoint(directory, tensors, config, fingerprint(config, tensors), reader)


def is_mapped(path: Path) -> bool:
    """Whether the file is a zip archive, which torch can map."""
    with open(path, "rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def load_state(path: Path) -> dict[str, Tensor]:
    """The state dict of one file; nothing in the file is executed.

    Raises:
        LoftqError: the file cannot be read, is damaged, wants to run code or holds no named tensors.
    """
    with pickle_errors(path):
        check_file(path)
        mapped = is_mapped(path)
        if mapped:
            with open(path, "rb") as handle:
                read_archive(handle, path).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    return named_tensors(path, content)


@contextmanager
def pickle_errors(path: PurePath) -> Iterator[None]:
    """Turn what torch raises for a bad file into one sentence."""
    try:
        yield
    except LoftqError:
        raise
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error
    except Exception as error:  # a damaged pickle can raise anything
        wanted = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if wanted and isinstance(error, pickle.UnpicklingError):
            raise LoftqError(
                f"{path} wants to run {wanted[1]}, which no weights need, and was not loaded: get the model as "
                "safetensors, or from somebody you trust."
            ) from error
        raise LoftqError(
            f"{path} is no file of weights that torch can read safely, or is damaged: download it again, or get the "
            "model as safetensors."
        ) from error


def in_order(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """As safetensors would store them; second views of the same memory last."""
    seen: set[object] = set()
    again = set()
    found = list(infos)
    for info in found:
        place = (info.start, info.shape, info.dtype)
        again |= {info.name} if place in seen else set()
        seen.add(place)
    return sorted(found, key=lambda info: (info.name in again, -info.dtype.itemsize, info.name))


def read_archive(handle: IO[bytes], path: PurePath) -> zipfile.ZipFile:
    """The archive's list of contents. Its bytes are used as they lie, so they must lie uncompressed.

    Raises:
        LoftqError: it is cut off or compressed.
    """
    try:
        archive = zipfile.ZipFile(handle)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise LoftqError(f"{path} is no complete archive ({error}): download it again.") from error
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise LoftqError(f"{path} is compressed, which torch.save never does: download the original file.")
    return archive


def named_tensors(path: PurePath, content: object, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a state dict, or of the one inside a training checkpoint; other entries are not weights.

    Raises:
        LoftqError: there are none, or one is of a kind that safetensors does not have.
    """
    if isinstance(content, Mapping):
        for candidate in (*(content.get(name) for name in _NESTED), content):
            if not isinstance(candidate, Mapping):
                continue
            tensors = {name: value for name, value in candidate.items() if isinstance(value, Tensor)}
            if tensors and all(isinstance(name, str) for name in tensors):
                return {name: _checked(path, name, tensor, device) for name, tensor in tensors.items()}
    raise LoftqError(f"{path} holds no tensors by name: it is no checkpoint of a model.")


def _checked(path: PurePath, name: str, tensor: Tensor, device: str) -> Tensor:
    plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == device
    if not plain or tensor.dtype not in SAFETENSORS_NAMES:
        kind = str(tensor.dtype if plain else tensor.layout).removeprefix("torch.")
        raise LoftqError(f"tensor {name} in {path} is of the unknown kind {kind}: save it as plain bfloat16 first.")
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), _REPEATED):
        raise LoftqError(f"tensor {name} in {path} claims to be larger than what the file holds: download it again.")
    return tensor.detach()


def state_info(file: str, name: str, tensor: Tensor, number: int, first: int) -> TensorInfo:
    """The place of a tensor in memory, counted from `first`; `number` is negative and its own."""
    # Only whole contiguous tensors can be told by their place alone; the others get a number of their own.
    start = tensor.data_ptr() - first if tensor.numel() and tensor.is_contiguous() else number
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, start)
