"""sha256 of files and of the tensors in them, read back from the disk in pieces."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.machine.json_record import Count, Sha256, json_record
from loftq_cli.tensorfile.tensors import TensorFile
from loftq_cli.tensorfile.writer import read_pieces

HEADER = "the header"


_CHUNK = 8 << 20


def check_file(path: Path, file: TensorFile, hashes: Mapping[str, str]) -> tuple[FileRecord, list[str]]:
    """Read a complete safetensors file back from the disk: its record, and which of its tensors (or `HEADER`) are not
    what was written."""
    whole, damaged = hashlib.sha256(), []
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # what is only in memory proves nothing about the disk
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        header = b"".join(read_pieces(handle, 0, len(file.header)))
        whole.update(header)
        damaged += [] if header == file.header else [HEADER]
        with ThreadPoolExecutor(2, "loftq-hash") as beside:
            for tensor in file.tensors:
                for span in file.spans(tensor):
                    own = _hash_twice(read_pieces(handle, span.start, span.nbytes), whole, beside)
                    expected = hashes[span.name] if span.name else hashlib.sha256(bytes(span.nbytes)).hexdigest()
                    damaged += [] if own == expected else [tensor.name]
        size = os.fstat(handle).st_size
        return FileRecord(size, whole.hexdigest()), damaged if size == file.nbytes else [HEADER, *damaged]
    finally:
        os.close(handle)


def _hash_twice(pieces: Iterator[bytes], whole: hashlib._Hash, beside: Executor) -> str:
    """The sha256 of the pieces; meanwhile `whole` takes them too, and the next one is read, on other cores."""
    own, following = hashlib.sha256(), beside.submit(next, pieces, b"")
    while piece := following.result():
        following, taken = beside.submit(next, pieces, b""), beside.submit(whole.update, piece)
        own.update(piece)
        taken.result()
    return own.hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Size and sha256, read back in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as handle:
        if hasattr(os, "posix_fadvise"):  # what is only in memory proves nothing about the disk
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
