"""Read `pytorch_model.bin`, single or sharded, as `torch.save` writes it, without running any code in it.

Only the requested tensors of zip files (torch 1.6 and later) are read. Older files are loaded whole, one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq_cli.checkpoint.archives import ByteSource, Piece, is_zip, pickle_errors, read_pieces, read_whole
from loftq_cli.checkpoint.base import SideFile, TensorInfo, fingerprint
from loftq_cli.checkpoint.files import LocalFile
from loftq_cli.checkpoint.local import CONFIG_HINT, check_file, collect, find_files, read_index, read_json
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.errors import LoftqError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
SHARDS = "pytorch_model-*.bin"
_LOCAL_HEADER = 30  # bytes before an entry's name and extra field, whose lengths are its last two numbers


class TensorReader(Protocol):
    """Reads tensors of pickled files by file and name; see `PickleReader`."""

    def infos(self, file: str) -> list[TensorInfo]:
        """Return the tensors of one file in the order in which safetensors would store them, repeated views last.

        Raises:
            LoftqError: the file is damaged, tries to run code, or contains tensors of an unsupported kind.
        """

    def copy(self, file: str, name: str, target: Tensor) -> None:
        """Copy one tensor into `target`, which has its shape."""

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""

    def row(self, file: str, name: str, index: int) -> Tensor:
        """Return one row of a matrix, or one entry of any tensor's first dimension."""

    def cancel(self) -> None:
        """See `checkpoint.base.Checkpoint.cancel`."""

    def close(self) -> None:
        """Release memory."""


@dataclass(frozen=True)
class PickleReader:
    """Implements `TensorReader` over local files or files on the Hub.

    Attributes:
        files: the files by their names in the checkpoint.
        stop: set by `cancel`; ends waiting for the network.
        whole: number of files in the old format that may be in memory at once.
    """

    files: Mapping[str, ByteSource]
    stop: threading.Event = field(default_factory=threading.Event)
    whole: int = 1
    _pieces: dict[str, Mapping[str, Piece] | None] = field(default_factory=dict, repr=False, compare=False)
    _states: dict[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _starts: dict[tuple[str, str], int] = field(default_factory=dict, repr=False, compare=False)

    def infos(self, file: str) -> list[TensorInfo]:
        pieces = self._zipped(file)
        if pieces is not None:
            return storage_order(
                _piece_info(file, name, piece, -1 - i) for i, (name, piece) in enumerate(pieces.items())
            )
        state = self._state(file)
        first = min((tensor.data_ptr() for tensor in state.values() if tensor.numel()), default=0)
        return storage_order(
            state_info(file, name, tensor, -1 - i, first) for i, (name, tensor) in enumerate(state.items())
        )

    def copy(self, file: str, name: str, target: Tensor) -> None:
        pieces = self._zipped(file)
        if pieces is None:
            target.copy_(self._state(file)[name])
            return
        piece = pieces[name]
        direct = piece.tensor.is_contiguous() and target.is_contiguous() and target.dtype == piece.tensor.dtype
        if direct and not piece.swapped and target.numel():
            self.files[file].read_into(self._place(file, piece), target.reshape(-1).view(torch.uint8))
        else:
            target.copy_(self._fetch(file, piece))

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        pieces = self._zipped(file)
        return tuple((self._state(file)[name] if pieces is None else pieces[name].tensor).shape)

    def row(self, file: str, name: str, index: int) -> Tensor:
        pieces = self._zipped(file)
        if pieces is None:
            return self._state(file)[name][index].clone()
        piece = pieces[name]
        return self._fetch(file, Piece(piece.key, piece.header, piece.tensor[index], piece.swapped))

    def cancel(self) -> None:
        self.stop.set()

    def close(self) -> None:
        self.cancel()
        self._states.clear()
        for file in self.files.values():
            if isinstance(file, LocalFile):
                file.close()

    def _zipped(self, file: str) -> Mapping[str, Piece] | None:
        """Return the tensors of a zip file, or None for a file in the old format."""
        if file not in self._pieces:
            self._pieces[file] = read_pieces(self.files[file]) if is_zip(self.files[file]) else None
        return self._pieces[file]

    def _fetch(self, file: str, piece: Piece) -> Tensor:
        tensor, width = piece.tensor, piece.tensor.dtype.itemsize
        found = self.files[file].read(self._place(file, piece), piece.span * width)
        if piece.swapped and width > 1:
            found = found.view(-1, width).flip(1).reshape(-1)
        return found.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), 0)

    def _place(self, file: str, piece: Piece) -> int:
        """Return the offset of a tensor's first byte.

        Raises:
            LoftqError: the tensor lies beyond the end of the file.
        """
        width = piece.tensor.dtype.itemsize
        start = self._start(file, piece) + int(piece.tensor.storage_offset()) * width
        if start + piece.span * width > self.files[file].size:
            raise LoftqError(
                f"{self.files[file].where} is shorter than its central directory says: download it again, or try "
                "another --revision."
            )
        return start

    def _start(self, file: str, piece: Piece) -> int:
        """Return the offset of an entry's bytes; only the local header has the lengths of the fields before them."""
        if (file, piece.key) not in self._starts:
            local = self.files[file].read(piece.header, _LOCAL_HEADER).numpy().tobytes()
            if local[:4] != b"PK\x03\x04":
                raise LoftqError(
                    f"{self.files[file].where} is not a complete archive: download it again, or try another --revision."
                )
            lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            self._starts[file, piece.key] = piece.header + _LOCAL_HEADER + lengths
        return self._starts[file, piece.key]

    def _state(self, file: str) -> Mapping[str, Tensor]:
        if file not in self._states:
            while len(self._states) >= self.whole:
                del self._states[next(iter(self._states))]
            self._states[file] = read_whole(self.files[file])
        return self._states[file]


def local_pickles(directory: Path, files: Iterable[str], *, whole: int = 1) -> PickleReader:
    """Return a reader for files in a directory.

    Raises:
        LoftqError: a file is missing, or is a link out of the directory.
    """
    found = {name: LocalFile(directory / name) for name in files}
    for file in found.values():
        with pickle_errors(file.where):
            check_file(file.where)
    return PickleReader(found, whole=whole)


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
    """True if the directory contains files that `open_pickled` reads."""
    return any((directory / name).is_file() for name in (INDEX, SINGLE)) or any(directory.glob(SHARDS))


def open_pickled(directory: Path) -> PickledCheckpoint:
    """Read config.json, the index and every shard's list of tensors.

    Raises:
        LoftqError: a file is missing, damaged or tries to run code, or the index and the shards contradict each other.
    """
    sharded = not (directory / SINGLE).exists() and (directory / INDEX).exists()  # transformers prefers the single file
    index = read_index(directory / INDEX, ".bin") if sharded else None
    files = find_files(directory, SINGLE, SHARDS) if index is None else sorted(set(index.values()))
    return read_lists(directory, files, index, local_pickles(directory, files))


def read_lists(
    directory: Path, files: Iterable[str], index: Mapping[str, str] | None, reader: TensorReader
) -> PickledCheckpoint:
    """Return the checkpoint in `files`, which `reader` reads; `directory` contains config.json.

    Raises:
        LoftqError: as `open_pickled`.
    """
    config = read_json(directory / "config.json", CONFIG_HINT)
    tensors = collect(directory / INDEX, index, (info for file in files for info in reader.infos(file)))
    return PickledCheckpoint(directory, tensors, config, fingerprint(config, tensors), reader)


def storage_order(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Sort tensors as safetensors would store them, with repeated views of the same memory last."""
    seen: set[object] = set()
    again = set()
    found = list(infos)
    for info in found:
        place = (info.start, info.shape, info.dtype)
        again |= {info.name} if place in seen else set()
        seen.add(place)
    return sorted(found, key=lambda info: (info.name in again, -info.dtype.itemsize, info.name))


def state_info(file: str, name: str, tensor: Tensor, number: int, first: int) -> TensorInfo:
    """Return the location of a tensor in memory relative to `first`; `number` is negative and unique to the tensor."""
    # Only contiguous tensors are identified by their location alone; the others get the unique number.
    start = tensor.data_ptr() - first if tensor.numel() and tensor.is_contiguous() else number
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, start)


def _piece_info(file: str, name: str, piece: Piece, number: int) -> TensorInfo:
    tensor = piece.tensor
    whole = tensor.numel() and tensor.is_contiguous()
    start = piece.header + int(tensor.storage_offset()) * tensor.dtype.itemsize if whole else number
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, start)
