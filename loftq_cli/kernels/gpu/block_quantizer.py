"""The block quantizer on a GPU: codes, residual and norm in one pass over memory, compiled by Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loftq_cli.kernels.gpu import blocks as kernel
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks, midpoints
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.feedback import FeedbackGains
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, Scratch

_TILE = 2048  # elements that a program processes at once
_TILE_OF_WARP = 512  # elements per warp, 16 per thread: more would not fit in its registers
KINDS: dict[torch.dtype, int] = {
    torch.float32: kernel.FLOAT32.value,
    torch.bfloat16: kernel.BFLOAT16.value,
    torch.float16: kernel.FLOAT16.value,
}


@dataclass(frozen=True)
class TritonQuantizer:
    """`numerics.quantizers.block.BlockQuantizer`, bit for bit, in one pass over memory.

    Scales and levels are fitted by `BlockQuantizer` itself. Takes finite float32 matrices on one CUDA or ROCm device.
    """

    grid: BlockGrid
    levels: Tensor | None = None  # fitted to the matrix, if the codebook is a fitted one

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q and compute W - Q. Both arguments float32 [out, in]."""
        return self._quantize(weight, target, empty(weight, torch.float32), kernel.UNCORRECTED.value)

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        """Quantize W - BA to Q and compute W - Q, as `FusedQuantizer.quantize_corrected` describes."""
        dtype = torch.bfloat16 if half else torch.float32
        residual = residual_memory(weight, dtype, scratch)
        if found is None:
            return self._quantize(weight, weight, residual, kernel.UNCORRECTED.value)
        # The kernel reads each tile of BA before it overwrites it.
        product = found.product(dtype, out=residual)
        return self._quantize(weight, product, residual, (kernel.HALF if half else kernel.FULL).value)

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """Return W - Q, float32 [out, in]."""
        assert isinstance(quantized, QuantizedBlocks)
        weight, residual = weight.contiguous(), empty(weight, torch.float32)
        levels = _tables(self.grid, weight.device)[1] if quantized.levels is None else quantized.levels
        arrays = weight, quantized.codes.contiguous(), quantized.absmax, residual, levels
        tiling = _Tiling.of(self.grid, weight)
        with torch.cuda.device_of(weight):
            kernel.restore_blocks[tiling.programs,](
                *arrays, *tiling.places, **tiling.shape, value_kind=KINDS[self.grid.value_dtype], **tiling.launch
            )
        return residual

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        """Do what `BlockQuantizer.quantize_fitted` does."""
        return self._plain.quantize_fitted(weight, target, previous=previous, column_weight=column_weight)

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        """Do what `BlockQuantizer.quantize_roughly` does."""
        return self._plain.quantize_roughly(weight, target, previous=previous, column_weight=column_weight)

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        """Do what `BlockQuantizer.feed_back` does."""
        return self._plain.feed_back(weight, product, step, fed, gains)

    def with_levels(self, levels: Tensor) -> TritonQuantizer:
        """Return the same quantizer with other levels, float32 [2**bits], ascending."""
        return TritonQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Return better levels for the codes and scales of `step`."""
        return self._plain.fit_levels(target, step, column_weight=column_weight)

    @property
    def _plain(self) -> BlockQuantizer:
        return BlockQuantizer(self.grid, self.levels)

    def _quantize(self, weight: Tensor, target: Tensor, residual: Tensor, corrects: int) -> QuantizeStep:
        grid, weight, device = self.grid, weight.contiguous(), weight.device
        tiling = _Tiling.of(grid, weight)
        codes = empty(weight, torch.uint8)
        absmax = torch.empty(grid.n_blocks(*weight.shape), dtype=torch.float32, device=device)
        sums = torch.empty(tiling.programs, dtype=torch.float64, device=device)
        tables = _tables(grid, device) if self.levels is None else (midpoints(self.levels), self.levels)
        with torch.cuda.device_of(weight):
            kernel.quantize_blocks[tiling.programs,](
                weight, bits_of(target.contiguous()), codes, absmax, bits_of(residual), sums, *tables,
                *tiling.places, **tiling.shape, bits=grid.bits,
                divides_short=grid.layout == "flat" and weight.numel() % grid.block_size != 0,
                scale_kind=KINDS[grid.scale_dtype], value_kind=KINDS[grid.value_dtype],
                corrects=corrects, halves=residual.dtype == torch.bfloat16, **tiling.launch,
            )  # fmt: skip
        return QuantizeStep(QuantizedBlocks(codes, absmax, self.levels), residual, math.sqrt(float(sums.sum())))


@dataclass(frozen=True)
class _Tiling:
    """How a matrix is divided among programs.

    Attributes:
        programs: the number of programs.
        places: the number of blocks, elements after which a new block must start, and blocks between such starts.
        shape: the shape of a tile.
        launch: compiler options.
    """

    programs: int
    places: tuple[int, int, int]
    shape: dict[str, int]
    launch: dict[str, Any]

    @staticmethod
    def of(grid: BlockGrid, weight: Tensor) -> _Tiling:
        row = weight.shape[1] if grid.layout == "rows" else weight.numel()
        n_blocks, width = grid.n_blocks(*weight.shape), 1 << (grid.block_size - 1).bit_length()
        count = max(1, _TILE // width)
        warps = min(16, max(1, width * count // _TILE_OF_WARP))
        return _Tiling(
            programs=-(-n_blocks // count),
            places=(n_blocks, row, -(-row // grid.block_size)),
            shape={"block": grid.block_size, "width": width, "count": count},
            launch={"num_warps": warps, "enable_fp_fusion": False},
        )


def residual_memory(weight: Tensor, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
    """Return memory for W - Q: that of `scratch` if it fits, or new memory."""
    reuses = scratch is not None and scratch.residual.dtype == dtype and scratch.residual.is_contiguous()
    return scratch.residual if scratch and reuses else empty(weight, dtype)


def empty(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def bits_of(x: Tensor) -> Tensor:
    """Return bfloat16 as the bit patterns that the kernel takes, and float32 unchanged."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@cache
def _tables(grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    levels = grid.levels(device)
    return midpoints(levels), levels
