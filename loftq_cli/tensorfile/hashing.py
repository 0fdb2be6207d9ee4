"""Compute the sha256 of files and of the tensors in them, read back from disk in pieces."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.machine.json_record import Count, Sha256, json_record
from loftq_cli.machine.regular_files import open_regular
from loftq_cli.tensorfile.tensors import TensorFile
from loftq_cli.tensorfile.writer import read_pieces

HEADER = "the header"
_CHUNK = 8 << 20


def check_file(path: Path, file: TensorFile, hashes: Mapping[str, str]) -> tuple[FileRecord, list[str]]:
    """Read a complete safetensors file back from disk.

    Args:
        hashes: sha256 of everything that was written, by tensor or piece.

    Returns:
        The file's record, and the names of the tensors (or `HEADER`) that differ from what was written.
    """
    whole, damaged = hashlib.sha256(), []
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # drop cached pages, which say nothing about the disk
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        header = b"".join(read_pieces(handle, 0, len(file.header)))
        whole.update(header)
        damaged += [] if header == file.header else [HEADER]
        with ThreadPoolExecutor(2, "loftq-hash") as executor:
            for tensor in file.tensors:
                for span in file.spans(tensor):
                    own = _hash_twice(read_pieces(handle, span.start, span.nbytes), whole, executor)
                    expected = hashes[span.name] if span.name else hashlib.sha256(bytes(span.nbytes)).hexdigest()
                    damaged += [] if own == expected else [tensor.name]
        size = os.fstat(handle).st_size
        return FileRecord(size, whole.hexdigest()), damaged if size == file.nbytes else [HEADER, *damaged]
    finally:
        os.close(handle)


def _hash_twice(pieces: Iterator[bytes], whole: hashlib._Hash, executor: Executor) -> str:
    """Return the sha256 of the pieces; other threads meanwhile add them to `whole` and read the next one."""
    own, following = hashlib.sha256(), executor.submit(next, pieces, b"")
    while piece := following.result():
        following, added = executor.submit(next, pieces, b""), executor.submit(whole.update, piece)
        own.update(piece)
        added.result()
    return own.hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Return the size and sha256 of a file, read back in pieces.

    Raises:
        LoftqError: it is not a regular file.
    """
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as handle:
        if hasattr(os, "posix_fadvise"):  # drop cached pages, which say nothing about the disk
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


@json_record
@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one output file."""

    nbytes: Count
    sha256: Sha256
