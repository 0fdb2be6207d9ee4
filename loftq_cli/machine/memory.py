"""Control what happens to freed memory, and recognize out-of-memory errors."""

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
# Once set, thresholds no longer adjust themselves: these are the values that large tensors would have led to.
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _ARENA_MAX: 0}


class Float32Buffer:
    """Memory for W in float32 that each thread reuses from matrix to matrix: touching fresh pages costs as much as a
    pass over them."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def float32(self, source: Tensor) -> Tensor:
        """Return `source` on the CPU in float32; a copy, if one is needed, is valid until the thread's next call."""
        if source.dtype == torch.float32:
            return source
        buffer: Tensor | None = getattr(self._of_thread, "buffer", None)
        if buffer is None or buffer.numel() < source.numel():
            self._of_thread.buffer = buffer = None  # freed before a larger one is allocated
            self._of_thread.buffer = buffer = torch.empty(source.numel())
        return buffer[: source.numel()].view(source.shape).copy_(source)


@contextmanager
def shared_memory(*, keeps: bool) -> Iterator[None]:
    """Make glibc's allocator serve all threads from one arena while the block runs, so that memory freed by one thread
    can be reused by the others. Does nothing with another C library.

    Args:
        keeps: keep freed memory in the process: fetching zeroed pages from the system again costs a tenth of a
            conversion. The peak stays the same apart from fragmentation.
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


def free_memory(device: torch.device) -> None:
    """Collect unreachable reference cycles, such as models, and release the device memory that torch has cached."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if the device, or torch's allocator on the CPU, is out of memory. Libraries and drivers raise no type of
    their own for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory"))
