"""Freed memory kept for the next matrix: fetching zeroed pages from the system again costs a tenth of a conversion."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30, _ARENA_MAX: 1}
# Once set, thresholds no longer adjust themselves: these are what large tensors would have brought them to.
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _ARENA_MAX: 0}


@contextmanager
def reused_memory() -> Iterator[None]:
    """Where the C library is glibc, its allocator keeps what is freed, for all threads together, until the end. What a
    process has resident at its peak stays the same, but for gaps."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for name, value in _KEPT.items():
        library.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _USUAL.items():
            library.mallopt(name, value)
        library.malloc_trim(0)
