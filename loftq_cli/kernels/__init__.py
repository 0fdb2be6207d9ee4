"""Fast versions of the numerics, each beside a plain-torch twin in `loftq_cli.numerics`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from loftq_cli.numerics.affine import AffineGrid
from loftq_cli.numerics.affine_fit import AffineQuantizer
from loftq_cli.numerics.blocks import BlockGrid
from loftq_cli.numerics.codebooks import codebook
from loftq_cli.numerics.grids import Grid
from loftq_cli.numerics.loftq import BlockQuantizer, Quantizer


def block_quantizer(grid: Grid, device: torch.device | str) -> Quantizer:
    """The fastest quantizer of a grid on a device: compiled on the CPU and on NVIDIA and AMD GPUs, which torch both
    calls `cuda`; plain torch elsewhere. The same bits as plain torch on that device."""
    device = torch.device(device)
    compiled = _on_cpu() if device.type == "cpu" else _on_gpu(device) if device.type == "cuda" else None
    if isinstance(grid, AffineGrid):
        return AffineQuantizer(grid) if compiled is None else compiled.groups(grid)
    # Nested scales are known only when all blocks are.
    return BlockQuantizer(grid) if compiled is None or grid.nested else compiled.blocks(grid)


@dataclass(frozen=True)
class _Compiled:
    blocks: Callable[[BlockGrid], Quantizer]
    groups: Callable[[AffineGrid], Quantizer]


@cache
def _on_cpu() -> _Compiled | None:
    """The compiled quantizers' classes, or None, with one warning, where numba is missing or does not work here."""
    try:
        from loftq_cli.kernels.cpu import CompiledQuantizer
        from loftq_cli.kernels.cpu_groups import CompiledAffineQuantizer

        trial = torch.linspace(-1, 1, 128).reshape(2, 64)
        CompiledQuantizer(BlockGrid(codebook("nf", 2), 64, "rows", torch.float32, torch.float32)).quantize_residual(
            trial, trial
        )
    except Exception as error:  # whatever a compiler may raise: the plain twin always works
        _warn("the compiled quantizer is", error, "several times slower")
        return None
    return _Compiled(CompiledQuantizer, CompiledAffineQuantizer)


@cache
def _on_gpu(device: torch.device) -> _Compiled | None:
    """The same by Triton; the trial also compares bits, which depend on the device's compiler."""
    try:
        from loftq_cli.kernels.gpu import TritonQuantizer

        grid = BlockGrid(codebook("nf", 4), 64, "flat", torch.float32, torch.bfloat16)
        trial = torch.linspace(-1, 1, 130, device=device).reshape(2, 65)
        found, plain = (kind(grid).quantize_residual(trial, trial) for kind in (TritonQuantizer, BlockQuantizer))
        if not torch.equal(found.residual, plain.residual):
            raise ArithmeticError("its numbers are not those of plain torch")
    except Exception as error:  # whatever a compiler or a driver may raise
        _warn(f"the Triton quantizer on {device} is", error, "slower")
        return None
    return _Compiled(TritonQuantizer, AffineQuantizer)


def _warn(what: str, error: Exception, slower: str) -> None:
    warnings.warn(
        f"{what} not available ({type(error).__name__}: {error}); plain torch takes over, which is {slower}",
        stacklevel=4,
    )
