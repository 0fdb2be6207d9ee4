"""Choose the devices to compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.errors import UsageError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device cannot be '{name}': give auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        seen = f"{count} CUDA devices on this machine: give one of them" if count else "no CUDA device here: give auto"
        raise UsageError(f"--device {name}: torch sees {seen}, or cpu.")
    if device.type == "mps":
        raise UsageError("--device mps has no float64, which the low-rank steps need: give cpu.")
    if device.type == "xpu" and not torch.xpu.is_available():
        raise UsageError(f"--device {name}: torch sees no such device on this machine: give cpu.")
    if device.type not in ("cpu", "cuda", "xpu"):
        raise UsageError(f"--device cannot be '{name}': give auto, cpu, cuda or cuda:1.")
    return device


def choose_devices(name: str, num_processes: int | None) -> tuple[torch.device, ...]:
    """Return the device of each worker on this machine.

    Raises:
        UsageError: there is no such device, or `num_processes` is less than 1.
    """
    import torch

    if num_processes is not None and num_processes < 1:
        raise UsageError(f"--num-processes cannot be {num_processes}: give a whole number from 1 on.")
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None:
        return (device,) * (num_processes or 1)
    gpus = torch.cuda.device_count()
    return tuple(torch.device("cuda", i % gpus) for i in range(num_processes or gpus))
