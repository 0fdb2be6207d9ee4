"""Freed memory kept for the next matrix, or given back; and what its end looks like."""

from __future__ import annotations

import ctypes
import gc
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30, _ARENA_MAX: 1}
# Once set, thresholds no longer adjust themselves: these are what large tensors would have brought them to.
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _ARENA_MAX: 0}


class Room:
    """Memory for W in float32, which a thread uses for one matrix after the other: fresh pages cost as much as a pass
    over them."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def float32(self, source: Tensor) -> Tensor:
        """`source` on the CPU in float32; where that takes a copy, it lasts until the thread's next call."""
        if source.dtype == torch.float32:
            return source
        room: Tensor | None = getattr(self._of_thread, "room", None)
        if room is None or room.numel() < source.numel():
            self._of_thread.room = room = None  # before a larger one is asked for
            self._of_thread.room = room = torch.empty(source.numel())
        return room[: source.numel()].view(source.shape).copy_(source)


@contextmanager
def shared_memory(*, keeps: bool) -> Iterator[None]:
    """Where the C library is glibc, its allocator serves all threads from one place until the end, so that what one of
    them frees is there for the others.

    Args:
        keeps: it also keeps what is freed: fetching zeroed pages from the system again costs a tenth of a conversion.
            What is resident at the peak stays the same, but for gaps.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for name, value in (_KEEPING if keeps else _USUAL | {_ARENA_MAX: 1}).items():
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
