"""The compiled quantizer on the CPU: codes, residual and norm in one pass over memory, on torch's thread count."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from loftq_cli.kernels import numba_blocks
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks, midpoints
from loftq_cli.numerics.grids import Quantized
from loftq_cli.numerics.loftq import QuantizeStep
from loftq_cli.numerics.lowrank import LowRank

_CHUNKS_WORTH_A_THREAD = 4  # below, waking a thread costs more than it saves
_KINDS = {
    torch.float32: numba_blocks.FLOAT32,
    torch.bfloat16: numba_blocks.BFLOAT16,
    torch.float16: numba_blocks.FLOAT16,
}


@dataclass(frozen=True)
class CompiledQuantizer:
    """`numerics.loftq.BlockQuantizer`, bit for bit, in one pass over memory. Finite float32 CPU matrices."""

    grid: BlockGrid

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        return self._quantize(weight, target, torch.empty_like(weight), numba_blocks.NOT_AT_ALL)

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: QuantizeStep | None = None
    ) -> QuantizeStep:
        dtype = torch.bfloat16 if half else torch.float32
        reuses = scratch is not None and scratch.residual.dtype == dtype
        # Fresh pages cost as much as a pass over them.
        residual = scratch.residual if scratch and reuses else torch.empty_like(weight, dtype=dtype)
        if found is None:
            return self._quantize(weight, weight, residual, numba_blocks.NOT_AT_ALL)
        # The kernel reads each block of BA before it overwrites it.
        product = found.product(dtype, out=residual)
        how = numba_blocks.HALF if half else numba_blocks.FULL
        return self._quantize(weight, weight if half else product, residual, how)

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        assert isinstance(quantized, QuantizedBlocks), "blocks belong to a codebook grid"
        residual = torch.empty_like(weight)
        arrays = _flat(weight, quantized.codes, quantized.absmax, residual)
        levels, settings = self.grid.levels().numpy(), self._settings(weight)

        def work(first: int, last: int) -> None:
            numba_blocks.restore_chunks(*arrays, levels, *settings, _KINDS[self.grid.value_dtype], first, last)

        _share(work, -(-quantized.absmax.numel() // numba_blocks.CHUNK))
        return residual

    def _quantize(self, weight: Tensor, target: Tensor, residual: Tensor, corrects: int) -> QuantizeStep:
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        absmax = torch.empty(self.grid.n_blocks(*weight.shape), dtype=torch.float32)
        sums = np.zeros(-(-absmax.numel() // numba_blocks.CHUNK))
        half = residual.view(torch.uint16) if residual.dtype == torch.bfloat16 else torch.empty(0, dtype=torch.uint16)
        full = torch.empty(0) if half.numel() else residual
        arrays = _flat(weight.contiguous(), target.contiguous(), codes, absmax, full, half)
        kinds = _KINDS[self.grid.scale_dtype], _KINDS[self.grid.value_dtype]
        settings = (*self._settings(weight), self.grid.layout == "flat", *kinds, corrects)

        def work(first: int, last: int) -> None:
            numba_blocks.quantize_chunks(*arrays, sums, *_tables(self.grid), *settings, first, last)

        _share(work, sums.size)
        return QuantizeStep(QuantizedBlocks(codes, absmax), residual, math.sqrt(sums.sum()))

    def _settings(self, weight: Tensor) -> tuple[int, int]:
        """Elements after which blocks start anew, and elements of a block."""
        return weight.shape[1] if self.grid.layout == "rows" else weight.numel(), self.grid.block_size


def _flat(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.view(-1).numpy() for tensor in tensors]


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
    levels = grid.levels()
    return numba_blocks.padded(midpoints(levels).numpy(), levels.numpy())


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool a process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="loftq-kernel")
