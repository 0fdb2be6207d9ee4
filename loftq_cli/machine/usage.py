"""What this process has used: memory, device memory, and the versions of what it runs with."""

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
    """What a run took: wall seconds, peak resident and device bytes of its processes together, and on what."""

    device: str
    memory: int
    device_memory: int
    seconds: float = 0.0


def own_cost(device: torch.device) -> Cost:
    """What this process has taken on `device` up to now."""
    if device.type != "cuda":
        return Cost(str(device), peak_memory(), 0)
    return Cost(torch.cuda.get_device_name(device), peak_memory(), torch.cuda.max_memory_allocated(device))


def versions() -> dict[str, str]:
    """Of everything that can change a byte of the output."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    # On Linux this would be the peak of the process that started this one, where that was larger.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident bytes of this process now: interpreter and libraries, before any work."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 500 << 20
