"""Read pickled files on the Hub, as `torch.save` writes them, by range requests without a copy on disk.

A zip file (torch 1.6 and later) stores every tensor's bytes uncompressed: its central directory and its pickle are
fetched, the pickle is read by the unpickler that `torch.load(weights_only=True)` uses, and each tensor is one range. A
file in the old format has no such directory: it is read from beginning to end, once for its list of tensors and once
for their bytes, and is held in memory meanwhile.
"""

from __future__ import annotations

import io
import sys
import threading
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from loftq_cli.checkpoint.base import TensorInfo
from loftq_cli.checkpoint.pickled import named_tensors, pickle_errors, read_archive, state_info, storage_order
from loftq_cli.checkpoint.remote.ranges import RemoteFile
from loftq_cli.errors import LoftqError
from loftq_cli.hub.retry import HubModel

_TAIL = 64 << 10  # contains the central directory of nearly every file
_BUFFER = 64 << 10
_MAX_PICKLE = 256 << 20  # a pickle without its tensors' bytes
_LOCAL_HEADER = 30  # bytes before an entry's name and extra field, whose lengths are its last two numbers


@dataclass(frozen=True)
class Piece:
    """The location of one tensor of a zip file: in the entry `key`, whose local header starts at `header`."""

    key: str
    header: int
    tensor: Tensor

    @property
    def span(self) -> int:
        """Return the number of elements from the first to the last."""
        if self.tensor.numel() == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride()))


@dataclass(frozen=True)
class RemotePickles:
    """Implements `checkpoint.pickled.TensorReader` over range requests.

    Attributes:
        files: the files by their names in the checkpoint.
        whole: number of files in the old format that may be in memory at once.
    """

    files: Mapping[str, RemoteFile]
    stop: threading.Event
    whole: int = 1
    _pieces: dict[str, Mapping[str, Piece]] = field(default_factory=dict, repr=False, compare=False)
    _states: dict[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _starts: dict[tuple[str, str], int] = field(default_factory=dict, repr=False, compare=False)

    def infos(self, file: str) -> list[TensorInfo]:
        if is_zip(self.files[file]):
            self._pieces[file] = _read_pieces(self.files[file])
            return storage_order(
                _piece_info(file, name, piece, -1 - i) for i, (name, piece) in enumerate(self._pieces[file].items())
            )
        state = self._state(file)
        first = min((tensor.data_ptr() for tensor in state.values() if tensor.numel()), default=0)
        return storage_order(
            state_info(file, name, tensor, -1 - i, first) for i, (name, tensor) in enumerate(state.items())
        )

    def copy(self, file: str, name: str, target: Tensor) -> None:
        target.copy_(self._read(file, name) if file in self._pieces else self._state(file)[name])

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        if file in self._pieces:
            return tuple(self._pieces[file][name].tensor.shape)
        return tuple(self._state(file)[name].shape)

    def row(self, file: str, name: str, index: int) -> Tensor:
        if file not in self._pieces:
            return self._state(file)[name][index].clone()
        piece = self._pieces[file][name]
        return self._fetch(file, Piece(piece.key, piece.header, piece.tensor[index]))

    def cancel(self) -> None:
        self.stop.set()

    def close(self) -> None:
        self.cancel()
        self._states.clear()

    def _read(self, file: str, name: str) -> Tensor:
        return self._fetch(file, self._pieces[file][name])

    def _fetch(self, file: str, piece: Piece) -> Tensor:
        tensor, remote = piece.tensor, self.files[file]
        width = tensor.dtype.itemsize
        start = self._start(file, piece) + int(tensor.storage_offset()) * width
        if start + piece.span * width > remote.size:
            raise LoftqError(f"{remote.where} is shorter than its central directory says: try another --revision.")
        found = remote.read(start, piece.span * width).view(tensor.dtype)
        return found.as_strided(tensor.shape, tensor.stride(), 0)

    def _start(self, file: str, piece: Piece) -> int:
        """Return the offset of an entry's bytes; only the local header has the lengths of the fields before them."""
        if (file, piece.key) not in self._starts:
            local = self.files[file].read(piece.header, _LOCAL_HEADER).numpy().tobytes()
            if local[:4] != b"PK\x03\x04":
                raise LoftqError(f"{self.files[file].where} is not a complete archive: try another --revision.")
            lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            self._starts[file, piece.key] = piece.header + _LOCAL_HEADER + lengths
        return self._starts[file, piece.key]

    def _state(self, file: str) -> Mapping[str, Tensor]:
        if file not in self._states:
            while len(self._states) >= self.whole:
                del self._states[next(iter(self._states))]
            self._states[file] = _read_whole(self.files[file])
        return self._states[file]


def remote_pickles(model: HubModel, folder: str, files: list[str], *, whole: int = 1) -> RemotePickles:
    """Return a reader for `files` in the folder `folder` of a commit ("" or a name that ends in a slash)."""
    stop = threading.Event()
    return RemotePickles({name: RemoteFile(model, folder + name, stop) for name in files}, stop, whole)


def is_zip(file: RemoteFile) -> bool:
    """True if the file is a zip archive, so that parts of it can be read."""
    return file.read(0, min(file.size, 4)).numpy().tobytes() == b"PK\x03\x04"


class _Ranges(io.RawIOBase):
    """A file on the Hub as a Python file object. Its end, where zip files have their directory, is fetched once."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._size = file.size
        self._at = 0
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
        if count and self._at >= self._tail_start:
            if self._tail is None:
                self._tail = self._file.read(self._tail_start, self._size - self._tail_start).numpy().tobytes()
            first = self._at - self._tail_start
            view[:count] = self._tail[first : first + count]
        elif count:
            view[:count] = self._file.read(self._at, count).numpy().data
        self._at += count
        return count


def _read_pieces(file: RemoteFile) -> dict[str, Piece]:
    """Return every tensor of a zip file, on the meta device, with its location.

    Raises:
        LoftqError: the file is damaged or tries to run code.
    """
    # Private, but torch.load calls it itself, with the same signature since torch 1.13.
    from torch._weights_only_unpickler import Unpickler

    storages: dict[int, str] = {}
    with pickle_errors(file.where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with read_archive(io.BufferedReader(_Ranges(file), _BUFFER), file.where) as archive:
            pickle, folder, entries = _read_pickle(archive, file)
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

        unpickler: Any = Unpickler(io.BytesIO(pickle), encoding="utf-8")  # type: ignore[no-untyped-call]
        unpickler.persistent_load = storage
        tensors = named_tensors(file.where, unpickler.load(), "meta")
        return {
            name: Piece(key, entries[f"{folder}data/{key}"].header_offset, tensor)
            for name, tensor in tensors.items()
            for key in [storages[tensor.untyped_storage()._cdata]]
        }


def _read_pickle(archive: zipfile.ZipFile, file: RemoteFile) -> tuple[bytes, str, dict[str, zipfile.ZipInfo]]:
    """Return the pickle of an archive, the folder that contains all entries, and the entries by name.

    Raises:
        LoftqError, ValueError: torch.save did not write the archive, or the byte order differs from this machine's.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    (name,) = (name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1)
    folder = name.removesuffix("data.pkl")
    if entries[name].file_size > _MAX_PICKLE:
        raise ValueError("the pickle is too large")
    order = f"{folder}byteorder"
    if order in entries and archive.read(order).decode() != sys.byteorder:
        raise LoftqError(f"{file.where} was saved with a different byte order: leave out --stream.")
    return archive.read(name), folder, entries


def _read_whole(file: RemoteFile) -> dict[str, Tensor]:
    """Load a file in the old format into memory."""
    with pickle_errors(file.where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = io.BufferedReader(_Ranges(file), _BUFFER)
        content = torch.load(handle, weights_only=True, map_location="cpu")
    return named_tensors(PurePosixPath(file.where), content)


def _piece_info(file: str, name: str, piece: Piece, number: int) -> TensorInfo:
    tensor = piece.tensor
    whole = tensor.numel() and tensor.is_contiguous()
    start = piece.header + int(tensor.storage_offset()) * tensor.dtype.itemsize if whole else number
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, start)
