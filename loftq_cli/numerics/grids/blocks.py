"""Block-wise absmax quantization on a container's own grid (QLoRA eq. 1-2; LoftQ section 3.1).

A `BlockGrid` holds everything that determines the bytes: levels, block layout, the dtype in which scales are stored and
the dtype to which the loader rounds the product. `dequantize` computes what the container's loader computes, bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.numerics.grids.codebooks import Codebook
from loftq_cli.numerics.grids.nested import NESTED_BLOCK, NestedScales, quantize_scales
from loftq_cli.numerics.grids.panels import panels

Layout = Literal["rows", "flat"]

# The same guard as in bitsandbytes: the reciprocal of anything smaller would overflow float32.
_SMALLEST_ABSMAX = 1e-38


@dataclass(frozen=True)
class BlockGrid:
    """How a container quantizes a matrix [out, in].

    Attributes:
        codebook: the levels, in units of the block's absmax.
        block_size: elements that share one absmax.
        layout: `rows` blocks run along each row, and the last block of a row may be shorter; `flat` blocks run over the
            row-major flattened matrix, and only the very last block may be shorter (bitsandbytes).
        scale_dtype: dtype to which absmax is rounded before any code is chosen.
        value_dtype: dtype to which the loader rounds `level * absmax` (the product is computed in float32).
        signed: True if the container accepts negative scales, which mirror an asymmetric codebook.
        nested: True if absmax itself is quantized to 8 bits (double quantization) before any code is chosen.
    """

    codebook: Codebook
    block_size: int
    layout: Layout
    scale_dtype: torch.dtype
    value_dtype: torch.dtype
    signed: bool = False
    nested: bool = False

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return self.codebook.bits

    @property
    def data_type(self) -> str:
        """The name of the levels in a recipe."""
        return self.codebook.data_type

    def information_bits(self, out_features: int, in_features: int) -> int:
        """Return the number of bits in codes, scales and per-matrix levels, however a container stores them."""
        n_blocks = self.n_blocks(out_features, in_features)
        scale_bits = self.scale_dtype.itemsize * 8 * n_blocks
        if self.nested:
            scale_bits = 8 * n_blocks + 32 * -(-n_blocks // NESTED_BLOCK) + 32
        levels = 32 * len(self.codebook.levels) if self.codebook.fitted else 0
        return out_features * in_features * self.bits + scale_bits + levels

    def n_blocks(self, out_features: int, in_features: int) -> int:
        """Return the number of absmax values of a matrix of this shape."""
        if self.layout == "rows":
            return out_features * -(-in_features // self.block_size)
        return -(-out_features * in_features // self.block_size)

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the codebook as float32 [2**bits]."""
        return torch.tensor(self.codebook.levels, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class QuantizedBlocks:
    """Codes uint8 [out, in]; absmax float32 [n_blocks] as the loader sees it, holding values of the grid's scale dtype.

    `absmax` is a block's scale: its largest magnitude, or a fitted scale (`numerics.quantizers.block_scales`).
    `levels`, float32 [2**bits], are specific to the matrix and set only for a `fitted` codebook. `nested` is stored in
    place of absmax if that is quantized too.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor | None = None
    nested: NestedScales | None = None


def quantize(x: Tensor, grid: BlockGrid) -> QuantizedBlocks:
    """Round every element to the nearest level of its block.

    Args:
        x: float32 [out, in].

    The arithmetic is that of bitsandbytes: multiply by the reciprocal of absmax (divide in the short last block of the
    flat layout), clamp, compare with the float32 midpoints; ties go to the lower code.
    """
    blocks = to_blocks(x, grid)  # [n_blocks, block_size]
    absmax = round_to(blocks.abs().amax(dim=1), grid.scale_dtype)
    nested = quantize_scales(absmax) if grid.nested else None
    absmax = absmax if nested is None else nested.dequantized()
    scaled = blocks * absmax.clamp(min=_SMALLEST_ABSMAX).reciprocal().unsqueeze(1)
    if grid.layout == "flat" and x.numel() % grid.block_size and absmax[-1] >= _SMALLEST_ABSMAX:
        scaled[-1] = blocks[-1] / absmax[-1]
    codes = torch.bucketize(scaled.clamp_(-1.0, 1.0), midpoints(grid.levels(x.device)), out_int32=True)
    return QuantizedBlocks(_from_blocks(codes.to(torch.uint8), x.shape, grid), absmax, nested=nested)


def assign(x: Tensor, scales: Tensor, grid: BlockGrid, levels: Tensor) -> Tensor:
    """Return codes uint8 [out, in] of the levels nearest to `x` for given scales [n_blocks], which may be negative."""
    inverse = scales.abs().clamp(min=_SMALLEST_ABSMAX).reciprocal().copysign(scales)
    scaled = to_blocks(x, grid) * inverse.unsqueeze(1)
    codes = torch.bucketize(scaled, midpoints(levels), out_int32=True)
    return _from_blocks(codes.to(torch.uint8), x.shape, grid)


def dequantize(quantized: QuantizedBlocks, grid: BlockGrid) -> Tensor:
    """Return what the container's loader computes: float32 [out, in] holding values of the grid's value dtype."""
    levels = grid.levels(quantized.codes.device) if quantized.levels is None else quantized.levels
    codes = to_blocks(quantized.codes, grid)  # [n_blocks, block_size]
    dense = torch.empty_like(codes, dtype=torch.float32)
    for part in panels(codes):
        values = levels.index_select(0, codes[part].flatten().int()).view(-1, grid.block_size)
        dense[part] = round_to(values.mul_(quantized.absmax[part].unsqueeze(1)), grid.value_dtype)
    return _from_blocks(dense, quantized.codes.shape, grid)


def midpoints(levels: Tensor) -> Tensor:
    """Return the decision thresholds between neighbouring levels, float32 [2**bits - 1]."""
    return (levels[:-1] + levels[1:]) / 2


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to values of `dtype`, saturating instead of overflowing; the result is float32."""
    if dtype == torch.float32:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def to_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """[out, in] -> [n_blocks, block_size]; short last blocks are padded with zeros."""
    if grid.layout == "flat":
        x = x.reshape(1, -1)
    rest = -x.shape[1] % grid.block_size
    return (F.pad(x, (0, rest)) if rest else x).reshape(-1, grid.block_size)


def _from_blocks(blocks: Tensor, shape: torch.Size, grid: BlockGrid) -> Tensor:
    """[n_blocks, block_size] -> [out, in], without the padding of short blocks."""
    if grid.layout == "flat":
        return blocks.reshape(-1)[: shape.numel()].reshape(shape)
    return blocks.reshape(shape[0], -1)[:, : shape[1]].contiguous()
