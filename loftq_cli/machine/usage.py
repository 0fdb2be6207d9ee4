"""The memory and device memory that this process has used, and the versions of the software it runs with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGES = ("loftq-cli", "torch", "transformers", "safetensors", "numba")


@dataclass(frozen=True)
class Cost:
    """The cost of a run: its device, wall seconds, and the peak resident and device bytes of all its processes."""

    device: str
    memory: int
    device_memory: int
    seconds: float = 0.0


def own_cost(device: torch.device) -> Cost:
    """Return the cost of this process on `device` so far."""
    if device.type != "cuda":
        return Cost(str(device), peak_memory(), 0)
    return Cost(torch.cuda.get_device_name(device), peak_memory(), torch.cuda.max_memory_allocated(device))


def available_memory() -> int:
    """Return the bytes of memory that programs can still take without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a byte of the output."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    # On Linux this is inherited: the peak of the process that started this one, if that was larger.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Return the current resident bytes of this process: interpreter and libraries, before any work."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import psutil

        return int(psutil.Process().memory_info().rss)
