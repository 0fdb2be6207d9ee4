"""Fast versions of the numerics; each has a plain-torch twin in `loftq_cli.numerics`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch

from loftq_cli.machine.collection import collection_paused
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.block_columns import BlockColumns
from loftq_cli.numerics.quantizers.columns import ColumnQuantizer
from loftq_cli.numerics.quantizers.integer import AffineQuantizer
from loftq_cli.numerics.quantizers.integer_columns import IntegerColumns
from loftq_cli.numerics.quantizers.protocols import Quantizer
from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer
from loftq_cli.numerics.quantizers.trellis_columns import TrellisColumns
from loftq_cli.numerics.quantizers.viterbi import Encode


def block_quantizer(grid: Grid, device: torch.device | str) -> Quantizer:
    """Return the fastest quantizer of a grid on a device.

    It is compiled on the CPU and on NVIDIA and AMD GPUs (torch calls both `cuda`), and plain torch elsewhere. Compiled
    quantizers compute the same bits as plain torch on a CPU.
    """
    device = torch.device(device)
    compiled = _compiled_quantizers() if device.type == "cpu" else None
    if isinstance(grid, AffineGrid):
        groups = _groups_on_gpu(device) if device.type == "cuda" else compiled.groups if compiled else None
        return AffineQuantizer(grid) if groups is None else groups(grid)
    if isinstance(grid, TrellisGrid):
        return TrellisQuantizer(grid, compiled.encode) if compiled else TrellisQuantizer(grid)
    if grid.nested:  # such scales are known only once all blocks are
        return BlockQuantizer(grid)
    blocks = _blocks_on_gpu(device) if device.type == "cuda" else compiled.blocks if compiled else None
    return BlockQuantizer(grid) if blocks is None else blocks(grid)


def column_quantizer(grid: Grid, device: torch.device | str) -> ColumnQuantizer:
    """Return the fastest quantizer of a grid that goes column by column, compiled on the CPU."""
    compiled = _compiled_quantizers() if torch.device(device).type == "cpu" else None
    if isinstance(grid, TrellisGrid):
        return TrellisColumns(grid, compiled.encode) if compiled else TrellisColumns(grid)
    if compiled is not None:
        from loftq_cli.kernels.cpu.column_quantizer import CompiledBlockColumns, CompiledIntegerColumns

        return CompiledIntegerColumns(grid) if isinstance(grid, AffineGrid) else CompiledBlockColumns(grid)
    return IntegerColumns(grid) if isinstance(grid, AffineGrid) else BlockColumns(grid)


def load_kernels(grids: Iterable[Grid], device: torch.device) -> None:
    """Import, and on first use compile, what `block_quantizer` will return, so that no matrix has to wait."""
    for grid in grids:
        block_quantizer(grid, device)


@dataclass(frozen=True)
class _Compiled:
    blocks: Callable[[BlockGrid], Quantizer]
    groups: Callable[[AffineGrid], Quantizer]
    encode: Encode


@cache
def _compiled_quantizers() -> _Compiled | None:
    """Return the compiled quantizers' classes, or None, with one warning, if numba is missing or does not work here."""
    try:
        with collection_paused():
            from loftq_cli.kernels.cpu.block_quantizer import CompiledQuantizer
            from loftq_cli.kernels.cpu.integer_quantizer import CompiledAffineQuantizer
            from loftq_cli.kernels.cpu.viterbi import encode

            trial = torch.linspace(-1, 1, 128).reshape(2, 64)
            CompiledQuantizer(BlockGrid(codebook("nf", 2), 64, "rows", torch.float32, torch.float32)).quantize_residual(
                trial, trial
            )
    except Exception as error:  # a compiler may raise anything, and the plain twin always works
        _warn("compiled quantizer", error, "several times slower")
        return None
    return _Compiled(CompiledQuantizer, CompiledAffineQuantizer, encode)


@cache
def _blocks_on_gpu(device: torch.device) -> Callable[[BlockGrid], Quantizer] | None:
    """Return the Triton quantizer's class, or None, with one warning, if it does not work on this device."""
    try:
        from loftq_cli.kernels.gpu.block_quantizer import TritonQuantizer

        grid = BlockGrid(codebook("nf", 4), 64, "flat", torch.float32, torch.bfloat16)
        _check(TritonQuantizer(grid), BlockQuantizer(grid), device)
    except torch.OutOfMemoryError:
        raise  # this does not mean that the quantizer fails
    except Exception as error:  # a compiler or a driver may raise anything
        _warn(f"Triton quantizer of blocks on {device}", error, "slower")
        return None
    return TritonQuantizer


@cache
def _groups_on_gpu(device: torch.device) -> Callable[[AffineGrid], Quantizer] | None:
    """Do the same for integer groups."""
    try:
        from loftq_cli.kernels.gpu.integer_quantizer import TritonAffineQuantizer

        grid = AffineGrid(4, 64, "integer", torch.float16, torch.bfloat16)
        _check(TritonAffineQuantizer(grid), AffineQuantizer(grid), device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        _warn(f"Triton quantizer of integer groups on {device}", error, "slower")
        return None
    return TritonAffineQuantizer


def _check(quantizer: Quantizer, plain: Quantizer, device: torch.device) -> None:
    """Compare a quantizer with its plain twin on a small matrix.

    Raises:
        ArithmeticError: the device's results differ from those of plain torch on a CPU.
    """
    trial = torch.linspace(-1, 1, 130).square().reshape(2, 65)
    residual = quantizer.quantize_residual(trial.to(device), trial.to(device)).residual
    if not torch.equal(residual.cpu(), plain.quantize_residual(trial, trial).residual):
        raise ArithmeticError("its results differ from those of plain torch")


def _warn(what: str, error: Exception, slower: str) -> None:
    warnings.warn(
        f"the {what} is not available ({type(error).__name__}: {error}); using plain torch instead, which is {slower}",
        stacklevel=4,
    )
