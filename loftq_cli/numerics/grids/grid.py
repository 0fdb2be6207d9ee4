"""Both kinds of grid under one name: codebook blocks and integer groups."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from loftq_cli.numerics.grids import affine, blocks
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks

Grid: TypeAlias = BlockGrid | AffineGrid
Quantized: TypeAlias = QuantizedBlocks | QuantizedGroups


def rows_of(quantized: Quantized, grid: Grid, rows: slice) -> Quantized | None:
    """Codes, scales and zeros of some rows [out, in], as views; None where blocks run on from row to row."""
    codes = quantized.codes[rows]
    if isinstance(quantized, QuantizedGroups):
        return QuantizedGroups(
            codes, quantized.scales[rows], None if quantized.zeros is None else quantized.zeros[rows]
        )
    assert isinstance(grid, BlockGrid), "blocks belong to a codebook grid"
    n_in = codes.shape[1]
    if grid.layout == "flat" and n_in % grid.block_size:
        return None
    absmax = quantized.absmax.view(quantized.codes.shape[0], grid.n_blocks(1, n_in))
    return QuantizedBlocks(codes, absmax[rows].reshape(-1), quantized.levels)


def dequantize(quantized: Quantized, grid: Grid) -> Tensor:
    """What the container's loader gives: float32 [out, in] holding values of the grid's value dtype."""
    if isinstance(quantized, QuantizedGroups):
        assert isinstance(grid, AffineGrid), "groups belong to an integer grid"
        return affine.dequantize(quantized, grid)
    assert isinstance(grid, BlockGrid), "blocks belong to a codebook grid"
    return blocks.dequantize(quantized, grid)
