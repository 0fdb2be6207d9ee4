"""Open files of other people: wait for no pipe or device, and hold no more than a file of the kind can have."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from loftq_cli.errors import LoftqError


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for a FIFO or a device.

    Raises:
        LoftqError: it is not a regular file.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise LoftqError(f"{path} is not a regular file: download it again.")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        LoftqError: it is larger, or not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as handle:
        # A file with nothing in it can have any size.
        fits = os.fstat(handle.fileno()).st_size <= most
        content = handle.read(most + 1) if fits else b""
    if not fits or len(content) > most:
        raise LoftqError(f"{path} has more than {most} bytes, which no such file has: download it again.")
    return content
