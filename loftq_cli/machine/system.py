"""The operating systems that loftq runs on, and what macOS lacks of Linux."""

from __future__ import annotations

import os
import sys

from loftq_cli.errors import LoftqError

_NOT_WINDOWS = "loftq runs on Linux and macOS, not on Windows itself: run `wsl --install`, then use loftq in WSL."


def check_system() -> None:
    """Refuse Windows before a module that only POSIX systems have is imported.

    Raises:
        LoftqError: this is Windows outside of WSL.
    """
    if sys.platform == "win32":
        raise LoftqError(_NOT_WINDOWS)


def usable_cores() -> int:
    """Return the number of cores that this process may use; macOS tells only how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_at(handle: int, target: memoryview, position: int) -> int:
    """Fill `target` from `position` of a file, and return the number of bytes read: 0 at its end.

    Some builds of Python for macOS have no `preadv`, which reads without a copy.

    Raises:
        OSError: it cannot be read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(handle, [target], position)
    found = os.pread(handle, len(target), position)
    target[: len(found)] = found
    return len(found)
