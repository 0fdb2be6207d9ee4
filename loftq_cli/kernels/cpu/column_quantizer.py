"""Compiled column quantizers on the CPU: the plain ones bit for bit, on as many threads as torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loftq_cli.kernels.cpu import block_scales as scales_kernel
from loftq_cli.kernels.cpu import blocks as blocks_kernel
from loftq_cli.kernels.cpu import columns as kernel
from loftq_cli.kernels.cpu.block_quantizer import _KINDS, _Fit, _padded, _share
from loftq_cli.kernels.cpu.integer_quantizer import CompiledAffineQuantizer
from loftq_cli.numerics.grids.affine import QuantizedGroups
from loftq_cli.numerics.grids.blocks import midpoints
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.quantizers.block_columns import BlockColumns, BlockSweep
from loftq_cli.numerics.quantizers.columns import Columns, Sweep
from loftq_cli.numerics.quantizers.integer_columns import IntegerColumns, IntegerSweep

_ROWS = 16  # rows in a chunk of work


@dataclass(frozen=True)
class CompiledBlockColumns(BlockColumns):
    """`numerics.quantizers.block_columns.BlockColumns`, bit for bit."""

    def sweep(self, weight: Tensor, column_weight: Tensor, before: Quantized | None) -> Sweep:
        sweep = super().sweep(weight, column_weight, before)
        if isinstance(sweep, BlockSweep):
            return CompiledBlockSweep(self, sweep.scales, sweep.codes, sweep.n_in, sweep.start)
        return sweep

    def fit(self, target: Tensor, column_weight: Tensor, start: Tensor | None) -> Tensor:
        """Do what `BlockColumns.fit` does."""
        grid = self.grid
        target = target.contiguous()
        scales, n_chunks = torch.empty(target.shape[0]), -(-target.shape[0] // blocks_kernel.CHUNK)
        kinds = _KINDS[grid.scale_dtype], _KINDS[grid.value_dtype]
        tables = _padded(self.used_levels(target.device))
        arguments = _Fit(start, column_weight, guards=start is None).arguments(
            grid, target.view(-1).numpy(), scales.numpy(), *tables, target.shape[1], *kinds
        )
        _share(lambda first, last: scales_kernel.fit_chunks(*arguments, first, last), n_chunks)
        return scales


@dataclass
class CompiledBlockSweep(BlockSweep):
    """A `columns.FusedSweep` over rows that are sequences of blocks."""

    def quantize_columns(self, columns: Columns, target: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        """Do what `columns.quantize_by_tiles` does."""
        levels = self.quantizer.used_levels(target.device)
        scales = self.scales[:, columns.start // self.block].contiguous().numpy()
        settings = midpoints(levels).numpy(), levels.numpy(), _KINDS[self.quantizer.grid.value_dtype]
        run = _Run(target, weight, feedback)
        _share(
            lambda first, last: kernel.quantize_with_levels(run.arrays, scales, *settings, *run.rows(first, last)),
            run.chunks,
        )
        return run.finish(self.codes, columns, target)


@dataclass(frozen=True)
class CompiledIntegerColumns(IntegerColumns):
    """`numerics.quantizers.integer_columns.IntegerColumns`, bit for bit."""

    def sweep(self, weight: Tensor, column_weight: Tensor, before: Quantized | None) -> Sweep:
        sweep = super().sweep(weight, column_weight, before)
        assert isinstance(sweep, IntegerSweep)
        return CompiledIntegerSweep(self, sweep.codes, sweep.scales, sweep.zeros)

    def fit(self, target: Tensor) -> QuantizedGroups:
        found = CompiledAffineQuantizer(self.grid).quantize_fitted(target, target).quantized
        assert isinstance(found, QuantizedGroups)
        return found


@dataclass
class CompiledIntegerSweep(IntegerSweep):
    """A `columns.FusedSweep` over groups of integers."""

    def quantize_columns(self, columns: Columns, target: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        """Do what `columns.quantize_by_tiles` does."""
        grid, affine = self.quantizer.grid, self.quantizer.affine(self.quantized(), columns)
        groups = [part[:, 0].contiguous().numpy() for part in (affine.scale, affine.point, affine.offset)]
        settings = np.float32(grid.top), _KINDS[grid.product_dtype], _KINDS[grid.value_dtype]
        run = _Run(target, weight, feedback)
        _share(
            lambda first, last: kernel.quantize_to_integers(run.arrays, *groups, *settings, *run.rows(first, last)),
            run.chunks,
        )
        return run.finish(self.codes, columns, target)


class _Run:
    """The arrays of one run, contiguous."""

    def __init__(self, target: Tensor, weight: Tensor, feedback: Tensor) -> None:
        self.target = target.contiguous()
        self.values = torch.empty_like(self.target)
        self.codes = torch.empty(self.target.shape, dtype=torch.uint8)
        shared = (weight.contiguous(), self.target, self.values, self.codes, feedback.contiguous())
        self.arrays = kernel.Run(*(tensor.numpy() for tensor in shared))
        self.chunks = -(-target.shape[0] // _ROWS)

    def rows(self, first: int, last: int) -> tuple[int, int]:
        return first * _ROWS, min(last * _ROWS, self.target.shape[0])

    def finish(self, codes: Tensor, columns: Columns, target: Tensor) -> Tensor:
        """Store codes and targets, and return the values."""
        codes[:, columns.slice] = self.codes
        target.copy_(self.target)
        return self.values
