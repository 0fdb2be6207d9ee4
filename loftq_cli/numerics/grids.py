"""Both kinds of grid under one name: codebook blocks and integer groups."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from loftq_cli.numerics import affine, blocks
from loftq_cli.numerics.affine import AffineGrid, QuantizedGroups
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks

Grid: TypeAlias = BlockGrid | AffineGrid
Quantized: TypeAlias = QuantizedBlocks | QuantizedGroups


def dequantize(quantized: Quantized, grid: Grid) -> Tensor:
    """What the container's loader gives: float32 [out, in] holding values of the grid's value dtype."""
    if isinstance(quantized, QuantizedGroups):
        assert isinstance(grid, AffineGrid), "groups belong to an integer grid"
        return affine.dequantize(quantized, grid)
    assert isinstance(grid, BlockGrid), "blocks belong to a codebook grid"
    return blocks.dequantize(quantized, grid)
