"""Write output files in place: headers first, then every tensor at its planned position, in any order."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.tensorfile.tensors import TensorFile

_PIECE = 8 << 20
_MOST_AT_ONCE = 1 << 30  # bytes of one call; macOS refuses calls of 2 GiB
_MOST_UNFLUSHED = 64 << 20  # bytes that may wait for a flush
# macOS has no fdatasync.
_flush = getattr(os, "fdatasync", os.fsync)


class ShardWriter:
    """Preallocated safetensors files; `place` returns the path of a planned file.

    A file has its final size and header from the start; unwritten parts read as zeros. The journal, not this class,
    records which parts are complete.
    """

    def __init__(self, place: Callable[[str], Path], files: tuple[TensorFile, ...]) -> None:
        self._place = place
        self._files = {file.name: file for file in files}
        self._homes = {tensor.name: (file, tensor) for file in files for tensor in (*file.tensors, *file.pieces)}
        self._handles: dict[str, int] = {}
        self._touched: set[str] = set()
        self.unflushed = 0  # bytes written since the last flush
        self._lost: OSError | None = None

    def prepare(self) -> None:
        """Create missing files; a file that exists already keeps its content."""
        for file in self._files.values():
            path = self._place(file.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = self._handles[file.name] = _open_own(path)
            if os.fstat(handle).st_size != file.nbytes or os.pread(handle, len(file.header), 0) != file.header:
                os.ftruncate(handle, 0)
                os.ftruncate(handle, file.nbytes)
                _write_all(handle, memoryview(file.header), 0)

    def open(self) -> None:
        """Open files that another process has prepared."""
        for file in self._files.values():
            self._handles[file.name] = os.open(self._place(file.name), os.O_RDWR | os.O_NOFOLLOW)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their positions; `flush` makes sure that they are on disk.

        A flush takes as long for a small tensor as for a large one, so it is the caller's, or comes once per
        `_MOST_UNFLUSHED` bytes.
        """
        for name, tensor in tensors.items():
            file, planned = self._homes[name]
            assert tensor.dtype == planned.dtype and tuple(tensor.shape) == planned.shape, f"{name} is not as planned"
            _write_all(self._handles[file.name], tensor_bytes(tensor), file.starts[name])
            self._touched.add(file.name)
            self.unflushed += planned.nbytes
        if self.unflushed >= _MOST_UNFLUSHED:
            self.flush()

    def hash(self, name: str) -> str:
        """Return the sha256 of the bytes at a tensor's position, read in pieces."""
        file, planned = self._homes[name]
        digest = hashlib.sha256()
        for piece in read_pieces(self._handles[file.name], file.starts[name], planned.nbytes):
            digest.update(piece)
        return digest.hexdigest()

    def write_at(self, name: str, offset: int, content: Tensor) -> None:
        """Write part of a tensor, from byte `offset` on; `flush` writes it to disk."""
        file, _ = self._homes[name]
        _write_all(self._handles[file.name], tensor_bytes(content), file.starts[name] + offset)
        self._touched.add(file.name)

    def flush(self) -> None:
        """Flush everything that has been written to disk.

        Raises:
            OSError: it failed, now or before: systems drop what they could not write, and say so only once.
        """
        if self._lost is not None:
            raise self._lost
        try:
            for name in sorted(self._touched):
                _flush(self._handles[name])
        except OSError as error:
            self._lost = error
            raise
        self._touched.clear()
        self.unflushed = 0

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Return the bytes at a tensor's position: all, or `nbytes` from `offset` on."""
        file, planned = self._homes[name]
        count = planned.nbytes if nbytes is None else nbytes
        return b"".join(read_pieces(self._handles[file.name], file.starts[name] + offset, count))

    def close(self) -> None:
        """Flush and close every file."""
        for handle in self._handles.values():
            os.fsync(handle)
            os.close(handle)
        self._handles.clear()


def _open_own(path: Path) -> int:
    """Open a file for writing in place, created if it is missing.

    Anything that has another name too is replaced by a new file: a link, a hard link (such as a backup's), a FIFO.
    """
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the tensor's memory, row-major, without a copy if it is contiguous."""
    dense = tensor.contiguous()
    # A tensor of one element is contiguous with any stride, and only a stride of 1 can be read as bytes.
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def read_pieces(handle: int, start: int, count: int) -> Iterator[bytes]:
    """Yield `count` bytes from `start` on, or fewer if the file ends before."""
    while count > 0 and (piece := os.pread(handle, min(count, _PIECE), start)):
        yield piece
        start, count = start + len(piece), count - len(piece)


def _write_all(handle: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(handle, data[:_MOST_AT_ONCE], position)
        data, position = data[written:], position + written
