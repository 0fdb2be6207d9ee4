"""Common names for all kinds of grid: codebook blocks, integer groups and the trellis."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from loftq_cli.numerics.grids import affine, blocks, trellis
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.grids.trellis import TrellisGrid

Grid: TypeAlias = BlockGrid | AffineGrid | TrellisGrid
Quantized: TypeAlias = QuantizedBlocks | QuantizedGroups


def rows_of(quantized: Quantized, grid: Grid, rows: slice) -> Quantized | None:
    """Return codes, scales and zeros of some rows, as views; None if they cannot be decoded without others."""
    if isinstance(grid, TrellisGrid):
        return None
    codes = quantized.codes[rows]
    if isinstance(quantized, QuantizedGroups):
        return QuantizedGroups(
            codes, quantized.scales[rows], None if quantized.zeros is None else quantized.zeros[rows]
        )
    assert isinstance(grid, BlockGrid), "blocks need a codebook grid"
    n_in = codes.shape[1]
    if grid.layout == "flat" and n_in % grid.block_size:
        return None
    absmax = quantized.absmax.view(quantized.codes.shape[0], grid.n_blocks(1, n_in))
    return QuantizedBlocks(codes, absmax[rows].reshape(-1), quantized.levels)


def dequantize(quantized: Quantized, grid: Grid) -> Tensor:
    """Return what the container's loader computes: float32 [out, in] holding values of the grid's value dtype."""
    if isinstance(quantized, QuantizedGroups):
        assert isinstance(grid, AffineGrid), "groups need an integer grid"
        return affine.dequantize(quantized, grid)
    if isinstance(grid, TrellisGrid):
        return trellis.dequantize(quantized, grid)
    assert isinstance(grid, BlockGrid), "blocks need a codebook grid"
    return blocks.dequantize(quantized, grid)
