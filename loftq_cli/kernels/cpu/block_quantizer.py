"""The compiled quantizer on the CPU: codes, residual and norm in one pass over memory, on as many threads as torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq_cli.kernels.cpu import block_scales as scales_kernel
from loftq_cli.kernels.cpu import blocks as blocks_kernel
from loftq_cli.kernels.cpu import feedback as feedback_kernel
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks, midpoints
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank
from loftq_cli.numerics.quantizers import block_scales as fitted
from loftq_cli.numerics.quantizers.feedback import FeedbackGains
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, Scratch, blocks_of

_CHUNKS_WORTH_A_THREAD = 4  # below, waking a thread costs more than it saves
_PANEL_CHUNKS = 16  # few enough that fitted blocks are quantized while they are still in the cache
_KINDS = {
    torch.float32: blocks_kernel.FLOAT32,
    torch.bfloat16: blocks_kernel.BFLOAT16,
    torch.float16: blocks_kernel.FLOAT16,
}


@dataclass(frozen=True)
class CompiledQuantizer:
    """`numerics.quantizers.block.BlockQuantizer`, bit for bit, in one pass over memory.

    Takes finite float32 matrices on the CPU.
    """

    grid: BlockGrid
    levels: Tensor | None = None  # fitted to the matrix, if the codebook is a fitted one

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        return self._quantize(weight, target, torch.empty_like(weight), blocks_kernel.UNCORRECTED)

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        dtype = torch.bfloat16 if half else torch.float32
        reuses = scratch is not None and scratch.residual.dtype == dtype
        residual = scratch.residual if scratch and reuses else torch.empty_like(weight, dtype=dtype)
        codes = None if scratch is None else scratch.codes
        if found is None:
            return self._quantize(weight, weight, residual, blocks_kernel.UNCORRECTED, codes=codes)
        # The kernel reads each block of BA before it overwrites it.
        product = found.product(dtype, out=residual)
        how = blocks_kernel.HALF if half else blocks_kernel.FULL
        return self._quantize(weight, weight if half else product, residual, how, codes=codes)

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        residual = torch.empty_like(weight) if previous is None else previous.residual
        fit = _Fit(None if previous is None else blocks_of(previous).absmax, column_weight)
        return self._quantize(weight, target, residual, blocks_kernel.UNCORRECTED, fit)

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        residual = torch.empty_like(weight) if previous is None else previous.residual
        fit = _Fit(None if previous is None else blocks_of(previous).absmax, column_weight, guards=False)
        return self._quantize(weight, target, residual, blocks_kernel.UNCORRECTED, fit)

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        half = product.view(torch.uint16) if product.dtype == torch.bfloat16 else torch.empty(0, dtype=torch.uint16)
        full = torch.empty(0) if half.numel() else product
        arrays = _flat(weight.contiguous(), full, half, step.residual, fed)
        n_chunks = -(-weight.numel() // feedback_kernel.CHUNK)
        sums = np.zeros(n_chunks)
        shares = np.float32(gains.kept), np.float32(gains.added), np.float32(gains.share)

        def work(first: int, last: int) -> None:
            feedback_kernel.feed_chunks(*arrays, sums, *shares, first, last)

        _share(work, n_chunks)
        return math.sqrt(sums.sum())

    def with_levels(self, levels: Tensor) -> CompiledQuantizer:
        """Return the same quantizer with other levels, float32 [2**bits], ascending."""
        return CompiledQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Return better levels for the codes and scales of `step`."""
        return fitted.fit_levels(target, blocks_of(step), self.grid, column_weight)

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        assert isinstance(quantized, QuantizedBlocks)
        residual = torch.empty_like(weight)
        arrays = _flat(weight, quantized.codes, quantized.absmax, residual)
        levels, settings = _levels(self.grid, quantized.levels), self._settings(weight)

        def work(first: int, last: int) -> None:
            blocks_kernel.restore_chunks(*arrays, levels, *settings, _KINDS[self.grid.value_dtype], first, last)

        _share(work, -(-quantized.absmax.numel() // blocks_kernel.CHUNK))
        return residual

    def _quantize(
        self,
        weight: Tensor,
        target: Tensor,
        residual: Tensor,
        corrects: int,
        fit: _Fit | None = None,
        codes: Tensor | None = None,
    ) -> QuantizeStep:
        grid = self.grid
        codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
        absmax = torch.empty(grid.n_blocks(*weight.shape), dtype=torch.float32)
        sums = np.zeros(-(-absmax.numel() // blocks_kernel.CHUNK))
        half = residual.view(torch.uint16) if residual.dtype == torch.bfloat16 else torch.empty(0, dtype=torch.uint16)
        full = torch.empty(0) if half.numel() else residual
        arrays = _flat(weight.contiguous(), target.contiguous(), codes, absmax, full, half)
        kinds = _KINDS[grid.scale_dtype], _KINDS[grid.value_dtype]
        settings = (*self._settings(weight), grid.layout == "flat", *kinds, corrects, fit is not None)
        tables = _tables(grid) if self.levels is None else _padded(self.levels)
        fitting = None if fit is None else fit.arguments(grid, arrays[1], arrays[3], *tables, settings[0], *kinds)

        def work(first: int, last: int) -> None:
            for panel in range(first, last, _PANEL_CHUNKS):
                here = panel, min(panel + _PANEL_CHUNKS, last)
                if fitting is not None:
                    scales_kernel.fit_chunks(*fitting, *here)
                blocks_kernel.quantize_chunks(*arrays, sums, *tables, *settings, *here)

        _share(work, sums.size)
        return QuantizeStep(QuantizedBlocks(codes, absmax, self.levels), residual, math.sqrt(sums.sum()))

    def _settings(self, weight: Tensor) -> tuple[int, int]:
        """Return the number of elements after which a new block must start, and the number of elements in a block."""
        return weight.shape[1] if self.grid.layout == "rows" else weight.numel(), self.grid.block_size


@dataclass(frozen=True)
class _Fit:
    """The task of `scales_kernel`: a full search, or fits from `previous` scales."""

    previous: Tensor | None
    column_weight: Tensor | None
    guards: bool = True

    def arguments(
        self,
        grid: BlockGrid,
        target: np.ndarray,
        scales: np.ndarray,
        middles: np.ndarray,
        levels: np.ndarray,
        row: int,
        scale_kind: int,
        value_kind: int,
    ) -> tuple[Any, ...]:
        """Return the arguments of `fit_chunks` except the chunks, after copying the previous scales into `scales`."""
        improves = self.previous is not None
        if self.previous is not None:
            scales[:] = self.previous.numpy()
        weights = np.empty(0, np.float32) if self.column_weight is None else self.column_weight.float().numpy()
        starts = np.array(fitted.starts(grid.signed), np.float32)
        refits = fitted.WARM_REFITS - 1 if improves else fitted.SEARCH_REFITS * self.guards
        return (
            target, scales, weights, middles, levels, starts, row, grid.block_size, scale_kind, value_kind,
            grid.signed, improves, self.guards, refits,
        )  # fmt: skip


def _flat(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.view(-1).numpy() for tensor in tensors]


def _share(work: Callable[[int, int], None], n_chunks: int) -> None:
    """Run `work` on chunks 0..n_chunks - 1, split over as many threads as torch uses."""
    shares = max(1, min(torch.get_num_threads(), n_chunks // _CHUNKS_WORTH_A_THREAD))
    ends = [n_chunks * share // shares for share in range(shares + 1)]
    others = [_pool(os.getpid()).submit(work, ends[i], ends[i + 1]) for i in range(1, shares)]
    work(ends[0], ends[1])
    for other in others:
        other.result()


@cache
def _tables(grid: BlockGrid) -> tuple[np.ndarray, np.ndarray]:
    return _padded(grid.levels())


def _levels(grid: BlockGrid, own: Tensor | None) -> np.ndarray:
    return (grid.levels() if own is None else own).numpy()


def _padded(levels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return blocks_kernel.padded(midpoints(levels).numpy(), levels.numpy())


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return a pool of threads; one per process, as threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="loftq-kernel")
