"""Read what `torch.save` wrote from any source of byte ranges, without running any code in it.

A zip file (torch 1.6 and later) stores every tensor's bytes uncompressed: its central directory and its pickle are
read, the pickle by the unpickler that `torch.load(weights_only=True)` uses, and each tensor is one range. A file in the
old format has no such directory: it is loaded whole.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loftq_cli.errors import LoftqError
from loftq_cli.machine.sizes import size_text
from loftq_cli.machine.usage import available_memory
from loftq_cli.tensorfile.dtypes import SAFETENSORS_NAMES

_NESTED = ("state_dict", "model", "module")
_REPEATED = 64 << 20  # bytes of a view that repeats its elements; a malicious file could describe one of any size
_TAIL = 64 << 10  # contains the central directory of nearly every file
_BUFFER = 64 << 10
_MAX_PICKLE = 256 << 20  # a pickle without its tensors' bytes
_MAX_DIRECTORY = 512 << 20  # bytes read for the central directory and the pickle
_ENORMOUS = ("bytearray",)  # names whose call with a number takes that much memory


class ByteSource(Protocol):
    """A file whose ranges can be read."""

    @property
    def where(self) -> PurePath: ...

    @property
    def size(self) -> int: ...

    def read(self, start: int, count: int) -> Tensor:
        """Return `count` bytes from `start`."""

    def read_into(self, start: int, target: Tensor) -> None:
        """Fill `target`, contiguous bytes, from `start`."""


@dataclass(frozen=True)
class Piece:
    """The location of one tensor of a zip file: in the entry `key`, whose local header starts at `header`.

    Attributes:
        tensor: on the meta device, with shape, strides and offset within the entry.
        swapped: the byte order differs from this machine's.
    """

    key: str
    header: int
    tensor: Tensor
    swapped: bool = False

    @property
    def span(self) -> int:
        """Return the number of elements from the first to the last."""
        if self.tensor.numel() == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride()))


class _Ranges(io.RawIOBase):
    """A byte source as a Python file object. Its end, where zip files have their directory, is read once."""

    def __init__(self, file: ByteSource, most: int | None = None) -> None:
        self._file = file
        self._size = file.size
        self._at = 0
        self._left = most
        self._tail_start = max(0, self._size - _TAIL)
        self._tail: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("seek before the beginning of the file")
        self._at = base + offset
        return self._at

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        if self._left is not None:
            if count > self._left:
                raise ValueError("the list of contents is too large")
            self._left -= count
        if count and self._at >= self._tail_start:
            if self._tail is None:
                self._tail = self._file.read(self._tail_start, self._size - self._tail_start).numpy().tobytes()
            first = self._at - self._tail_start
            view[:count] = self._tail[first : first + count]
        elif count:
            self._file.read_into(self._at, torch.frombuffer(view[:count], dtype=torch.uint8))
        self._at += count
        return count


class _NoIteration(TorchDispatchMode):
    """Refuses to iterate over a tensor: a view with a few bytes may have any number of rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "unbind" in str(func):
            raise pickle.UnpicklingError("a pickle iterates over a tensor")
        return func(*args, **(kwargs or {}))


def is_zip(file: ByteSource) -> bool:
    """True if the file is a zip archive, so that parts of it can be read.

    Raises:
        LoftqError: the file cannot be read.
    """
    with pickle_errors(file.where):
        return file.read(0, min(file.size, 4)).numpy().tobytes() == b"PK\x03\x04"


def read_pieces(file: ByteSource) -> dict[str, Piece]:
    """Return every tensor of a zip file, on the meta device, with its location.

    Raises:
        LoftqError: the file is damaged or tries to run code.
    """
    # Private, but torch.load calls it itself, with the same signature since torch 1.13.
    from torch._weights_only_unpickler import Unpickler

    storages: dict[int, str] = {}
    with pickle_errors(file.where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with read_archive(io.BufferedReader(_Ranges(file, _MAX_DIRECTORY), _BUFFER), file.where) as archive:
            content, folder, entries, swapped = _read_pickle(archive)
        _refuse_enormous(io.BytesIO(content), 1)
        typed: dict[str, torch.storage.TypedStorage] = {}

        def storage(saved: Any) -> torch.storage.TypedStorage:
            kind, key, _, count = saved[1:]
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            size = count * dtype.itemsize
            if key not in typed:
                if size < 0 or size > entries[f"{folder}data/{key}"].file_size:
                    raise ValueError(f"storage {key} is larger than its entry")
                untyped = torch.UntypedStorage(size, device="meta")
                typed[key] = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
                storages[untyped._cdata] = key
            return typed[key]

        unpickler: Any = Unpickler(io.BytesIO(content), encoding="utf-8")  # type: ignore[no-untyped-call]
        unpickler.persistent_load = storage
        with _NoIteration():
            loaded = unpickler.load()
        tensors = named_tensors(file.where, loaded, "meta")
        return {
            name: Piece(key, entries[f"{folder}data/{key}"].header_offset, tensor, swapped)
            for name, tensor in tensors.items()
            for key in [storages[tensor.untyped_storage()._cdata]]
        }


def read_whole(file: ByteSource) -> dict[str, Tensor]:
    """Load a file in the old format into memory.

    Raises:
        LoftqError: the file is damaged or tries to run code.
    """
    with pickle_errors(file.where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_room(file)
        handle = io.BufferedReader(_Ranges(file), _BUFFER)
        _refuse_enormous(handle, 4)  # magic number, protocol, machine, content
        handle.seek(0)
        with _NoIteration():
            content = torch.load(handle, weights_only=True, map_location="cpu")
    return named_tensors(file.where, content)


def _check_room(file: ByteSource) -> None:
    """
    Raises:
        LoftqError: the file is larger than the free memory.
    """
    free = available_memory()
    if file.size > free:
        raise LoftqError(
            f"{file.where} has {size_text(file.size)} in the format before torch 1.6, which is read whole, but only "
            f"{size_text(free)} of memory are free: free some, or get the model as safetensors."
        )


def _read_pickle(archive: zipfile.ZipFile) -> tuple[bytes, str, dict[str, zipfile.ZipInfo], bool]:
    """Return the pickle of an archive, the folder that contains all entries, the entries by name, and True if the byte
    order differs from this machine's.

    Raises:
        ValueError: torch.save did not write the archive.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    (name,) = (name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1)
    folder = name.removesuffix("data.pkl")
    if entries[name].file_size > _MAX_PICKLE:
        raise ValueError("the pickle is too large")
    order = entries.get(f"{folder}byteorder")
    words = archive.read(order).decode() if order is not None and order.file_size < 16 else "little"
    if words not in ("little", "big"):
        raise ValueError("unknown byte order")
    return archive.read(name), folder, entries, words != sys.byteorder


def _refuse_enormous(handle: IO[bytes], pickles: int) -> None:
    """Refuse calls that turn a number into as many bytes, in the next `pickles` pickles.

    Raises:
        pickle.UnpicklingError: there is such a call.
    """
    try:
        for _ in range(pickles):
            for _, argument, _ in pickletools.genops(handle):
                if isinstance(argument, str) and argument.split(" ")[-1] in _ENORMOUS:
                    raise pickle.UnpicklingError(f"GLOBAL builtins.{argument.split(' ')[-1]}")
    except ValueError:
        return  # damaged, or a pickle of another kind: the unpickler says so


@contextmanager
def pickle_errors(path: PurePath) -> Iterator[None]:
    """Turn the exceptions that torch raises for a bad file into one sentence."""
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
                f"{path} tries to run {wanted[1]}, which weights never need, and was not loaded: get the model as "
                "safetensors, or from a source you trust."
            ) from error
        raise LoftqError(
            f"{path} is damaged or is not a weight file that torch can read safely: download it again, or get the "
            "model as safetensors."
        ) from error


def read_archive(handle: IO[bytes], path: PurePath) -> zipfile.ZipFile:
    """Open an archive and check that its entries are uncompressed, since their bytes are used in place.

    Raises:
        LoftqError: the archive is incomplete or compressed.
    """
    try:
        archive = zipfile.ZipFile(handle)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise LoftqError(f"{path} is not a complete archive ({error}): download it again.") from error
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise LoftqError(f"{path} is compressed, which torch.save never does: download the original file.")
    return archive


def named_tensors(path: PurePath, content: object, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of the one inside a training checkpoint; other entries are ignored.

    Raises:
        LoftqError: there are none, or one is of a kind that safetensors does not support.
    """
    if isinstance(content, Mapping):
        for candidate in (*(content.get(name) for name in _NESTED), content):
            if not isinstance(candidate, Mapping):
                continue
            tensors = {name: value for name, value in candidate.items() if isinstance(value, Tensor)}
            if tensors and all(isinstance(name, str) for name in tensors):
                return {name: _checked(path, name, tensor, device) for name, tensor in tensors.items()}
    raise LoftqError(f"{path} contains no named tensors: give the checkpoint of a model.")


def _checked(path: PurePath, name: str, tensor: Tensor, device: str) -> Tensor:
    plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == device
    if not plain or tensor.dtype not in SAFETENSORS_NAMES:
        kind = str(tensor.dtype if plain else tensor.layout).removeprefix("torch.")
        raise LoftqError(f"tensor {name} in {path} has the unsupported type {kind}: save it as plain bfloat16 first.")
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), _REPEATED):
        raise LoftqError(f"tensor {name} in {path} claims to be larger than the data in the file: download it again.")
    return tensor.detach()
