"""The compiled quantizer on the CPU: codes, residual and norm in one pass over memory, on torch's thread count."""

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

from loftq_cli.kernels import numba_blocks, numba_fitted
from loftq_cli.numerics import fitted
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks, midpoints
from loftq_cli.numerics.loftq import QuantizeStep
from loftq_cli.numerics.lowrank import half_is_faster

_CHUNKS_WORTH_A_THREAD = 4  # below, waking a thread costs more than it saves
_PANEL_CHUNKS = 16  # what is fitted is quantized while the cache still holds it
_KINDS = {
    torch.float32: numba_blocks.FLOAT32,
    torch.bfloat16: numba_blocks.BFLOAT16,
    torch.float16: numba_blocks.FLOAT16,
}


@dataclass(frozen=True)
class CompiledQuantizer:
    """`numerics.loftq.BlockQuantizer`, bit for bit, in one pass over memory. Finite float32 CPU matrices."""

    grid: BlockGrid
    levels: Tensor | None = None  # the matrix's own, where the codebook is a fitted one

    def quantize_residual(self, weight: Tensor, target: Tensor, *, scratch: QuantizeStep | None = None) -> QuantizeStep:
        residual, half = _outputs(weight, scratch)
        return self._quantize(weight.contiguous(), target.contiguous(), residual, half, corrects=False)

    def quantize_corrected(
        self, weight: Tensor, lora_b: Tensor, lora_a: Tensor, *, scratch: QuantizeStep | None = None
    ) -> QuantizeStep:
        residual, half = _outputs(weight, scratch)
        product = torch.mm(lora_b, lora_a, out=residual)  # the kernel reads each block of it before it overwrites it
        return self._quantize(weight.contiguous(), product, residual, half, corrects=True)

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        residual, half = _outputs(weight, previous)
        scales = None if previous is None else previous.quantized.absmax
        return self._quantize(weight.contiguous(), target.contiguous(), residual, half, fit=_Fit(scales, column_weight))

    def with_levels(self, levels: Tensor) -> CompiledQuantizer:
        """The same with other levels, float32 [2**bits], ascending."""
        return CompiledQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Better levels for the codes and scales of `step`."""
        return fitted.fit_levels(target, step.quantized, self.grid, column_weight)

    def _quantize(
        self,
        weight: Tensor,
        target: Tensor,
        residual: Tensor,
        half: Tensor | None,
        *,
        corrects: bool = False,
        fit: _Fit | None = None,
    ) -> QuantizeStep:
        grid = self.grid
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        absmax = torch.empty(grid.n_blocks(*weight.shape), dtype=torch.float32)
        sums = np.zeros(-(-absmax.numel() // numba_blocks.CHUNK))
        arrays = [tensor.view(-1).numpy() for tensor in (weight, target, codes, absmax, residual)]
        bits = np.empty(0, np.uint16) if half is None else half.view(torch.uint16).view(-1).numpy()
        row = weight.shape[1] if grid.layout == "rows" else weight.numel()
        kinds = _KINDS[grid.scale_dtype], _KINDS[grid.value_dtype]
        tables = _tables(grid) if self.levels is None else _padded(self.levels)
        settings = (row, grid.block_size, grid.layout == "flat", *kinds, corrects, fit is not None)
        fitting = None if fit is None else fit.arguments(grid, arrays[1], arrays[3], *tables, row, *kinds)

        def work(first: int, last: int) -> None:
            for panel in range(first, last, _PANEL_CHUNKS):
                here = panel, min(panel + _PANEL_CHUNKS, last)
                if fitting is not None:
                    numba_fitted.fit_chunks(*fitting, *here)
                numba_blocks.quantize_chunks(*arrays, bits, sums, *tables, *settings, *here)

        _share(work, sums.size)
        return QuantizeStep(QuantizedBlocks(codes, absmax, self.levels), residual, math.sqrt(sums.sum()), half)


@dataclass(frozen=True)
class _Fit:
    """What `numba_fitted` is to do: a full search, or fits from `previous` scales."""

    previous: Tensor | None
    column_weight: Tensor | None

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
        """Those of `fit_chunks` before the chunks; puts the previous scales in place."""
        improves = self.previous is not None
        if self.previous is not None:
            scales[:] = self.previous.numpy()
        weights = np.empty(0, np.float32) if self.column_weight is None else self.column_weight.float().numpy()
        starts = np.array(fitted.starts(grid.signed), np.float32)
        refits = fitted.WARM_REFITS - 1 if improves else fitted.SEARCH_REFITS
        return (
            target, scales, weights, middles, levels, starts, row, grid.block_size, scale_kind, value_kind,
            grid.signed, improves, refits,
        )  # fmt: skip


def _outputs(weight: Tensor, scratch: QuantizeStep | None) -> tuple[Tensor, Tensor | None]:
    """Memory for the residual and, where products want it, its bfloat16 copy: fresh pages cost as much as a pass."""
    if scratch is not None and scratch.residual.shape == weight.shape:
        return scratch.residual, scratch.half
    half = torch.empty(weight.shape, dtype=torch.bfloat16) if half_is_faster(weight) else None
    return torch.empty(weight.shape, dtype=torch.float32), half


def _share(work: Callable[[int, int], None], n_chunks: int) -> None:
    """Do `work` on chunks 0..n_chunks - 1, split over as many threads as torch uses."""
    shares = max(1, min(torch.get_num_threads(), n_chunks // _CHUNKS_WORTH_A_THREAD))
    ends = [n_chunks * share // shares for share in range(shares + 1)]
    others = [_pool(os.getpid()).submit(work, ends[i], ends[i + 1]) for i in range(1, shares)]
    work(ends[0], ends[1])
    for other in others:
        other.result()


@cache
def _tables(grid: BlockGrid) -> tuple[np.ndarray, np.ndarray]:
    return _padded(grid.levels())


def _padded(levels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return numba_blocks.padded(midpoints(levels).numpy(), levels.numpy())


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool a process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="loftq-kernel")
