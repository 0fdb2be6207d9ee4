"""Freed memory kept for the next matrix, or given back; and what its end looks like."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30, _ARENA_MAX: 1}
# Once set, thresholds no longer adjust themselves: these are what large tensors would have brought them to.
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _ARENA_MAX: 0}


@contextmanager
def reused_memory() -> Iterator[None]:
    """Where the C library is glibc, its allocator keeps what is freed, for all threads together, until the end:
    fetching zeroed pages from the system again costs a tenth of a conversion. What is resident at the peak stays the
    same, but for gaps."""
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


def give_back(device: torch.device) -> None:
    """Let go of models that nobody holds but themselves, and of what torch keeps of the device for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or torch's allocator on the CPU, has none left. Libraries and drivers have no type for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory"))
