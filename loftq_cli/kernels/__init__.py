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
    """The fastest quantizer of a grid on a device: compiled on the CPU, plain torch elsewhere; the same bits."""
    compiled = _compiled_quantizers() if torch.device(device).type == "cpu" else None
    if isinstance(grid, AffineGrid):
        return AffineQuantizer(grid) if compiled is None else compiled.groups(grid)
    # Nested scales are known only when all blocks are.
    return BlockQuantizer(grid) if compiled is None or grid.nested else compiled.blocks(grid)


def load_kernels(device: torch.device) -> None:
    """Import, and on first use compile, what `block_quantizer` will give, so that the first matrices need not wait."""
    if device.type == "cpu":
        _compiled_quantizers()


@dataclass(frozen=True)
class _Compiled:
    blocks: Callable[[BlockGrid], Quantizer]
    groups: Callable[[AffineGrid], Quantizer]


@cache
def _compiled_quantizers() -> _Compiled | None:
    """The compiled quantizers' classes, or None, with one warning, where numba is missing or does not work here."""
    try:
        from loftq_cli.kernels.cpu import CompiledQuantizer
        from loftq_cli.kernels.cpu_groups import CompiledAffineQuantizer

        trial = torch.linspace(-1, 1, 128).reshape(2, 64)
        CompiledQuantizer(BlockGrid(codebook("nf", 2), 64, "rows", torch.float32, torch.float32)).quantize_residual(
            trial, trial
        )
    except Exception as error:  # whatever a compiler may raise: the plain twin always works
        warnings.warn(
            f"the compiled quantizer is not available ({type(error).__name__}: {error}); plain torch takes over, which "
            "is several times slower",
            stacklevel=3,
        )
        return None
    return _Compiled(CompiledQuantizer, CompiledAffineQuantizer)
