"""Which devices to compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.errors import UsageError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one.

    Raises:
        UsageError: no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device cannot be '{name}': give auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine shows torch {torch.cuda.device_count()} CUDA devices.")
    if device.type not in ("cpu", "cuda", "xpu", "mps"):
        raise UsageError(f"--device cannot be '{name}': give auto, cpu, cuda or cuda:1.")
    return device


def choose_devices(name: str, num_processes: int | None) -> tuple[torch.device, ...]:
    """What each of the workers on this machine computes on.

    Raises:
        UsageError: no such device, or no such number of workers.
    """
    import torch

    if num_processes is not None and num_processes < 1:
        raise UsageError(f"--num-processes cannot be {num_processes}: give a whole number from 1 on.")
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None:
        return (device,) * (num_processes or 1)
    gpus = torch.cuda.device_count()
    return tuple(torch.device("cuda", i % gpus) for i in range(num_processes or gpus))
