"""Group-wise integer quantization on a container's own grid: Q = scale · (code - zero), or scale · code + offset.

An `AffineGrid` holds everything that determines the bytes: code range, group, kind of zero, the dtypes in which scale
and zero are stored, and the dtypes to which the loader rounds the product and the value. `dequantize` computes what the
container's loader computes, bit for bit. `numerics.quantizers.integer` chooses scales and zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loftq_cli.numerics.grids.blocks import round_to

Zero = Literal["none", "integer", "float"]
ScaleRule = Literal["absmax", "minmax", "mse"]
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)

_SMALLEST_SCALE = 1e-37  # the reciprocal of anything smaller overflows float32

# Elements processed at a time: the temporaries of one step fit in the cache, and memory stays bounded.
_PANEL_CPU, _PANEL_GPU = 2**18, 2**24


@dataclass(frozen=True)
class AffineGrid:
    """How a container stores a matrix [out, in] as integers.

    Attributes:
        bits: width of a code; codes run from 0 to 2**bits - 1.
        group_size: elements of a row that share a scale and a zero; 0 means the whole row. The last group of a row may
            be shorter.
        zero: `none` is a fixed zero of 2**(bits - 1), so values are scale · (-2**(bits-1) … 2**(bits-1) - 1) and the
            scale may be negative; `integer` is a code, at least `least_zero`; `float` is an offset, the value of code
            0, so values are scale · code + offset.
        scale_dtype: dtype of the stored scale; `zero_dtype`: dtype of the stored offset (`float` only).
        product_dtype: dtype to which the loader rounds scale · (code - zero).
        value_dtype: dtype to which the loader then rounds the value. Products and sums are computed in float32.
        scale_rule: how scales are chosen (see `numerics.quantizers.integer`).
        least_zero: smallest zero point the container can hold (`integer` only).
    """

    bits: int
    group_size: int
    zero: Zero
    scale_dtype: torch.dtype
    value_dtype: torch.dtype
    product_dtype: torch.dtype = torch.float32
    zero_dtype: torch.dtype = torch.float32
    scale_rule: ScaleRule = "mse"
    least_zero: int = 0

    @property
    def data_type(self) -> str:
        """The name of the levels in a recipe."""
        return "int"

    @property
    def block_size(self) -> int:
        """Number of elements that share a scale; 0 means the whole row."""
        return self.group_size

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def width(self, in_features: int) -> int:
        """Return the number of elements in a full group, for a row of this length."""
        return self.group_size or in_features

    def n_blocks(self, out_features: int, in_features: int) -> int:
        """Return the number of scales of a matrix of this shape."""
        return out_features * -(-in_features // self.width(in_features))

    def information_bits(self, out_features: int, in_features: int) -> int:
        """Return the number of bits in codes, scales and zeros."""
        zero_bits = {"none": 0, "integer": self.bits, "float": 8 * self.zero_dtype.itemsize}[self.zero]
        group_bits = 8 * self.scale_dtype.itemsize + zero_bits
        return out_features * in_features * self.bits + self.n_blocks(out_features, in_features) * group_bits


@dataclass(frozen=True)
class QuantizedGroups:
    """Codes uint8 [out, in]; scales and zeros float32 [out, groups], holding values of their stored dtypes.

    `zeros` are zero points, or offsets if the grid's zero is `float`; None if it is `none`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True)
class Affine:
    """Scale, zero point and offset of groups, float32 [rows, groups] each: value = scale · (code - point) + offset."""

    scale: Tensor
    point: Tensor
    offset: Tensor

    def where(self, condition: Tensor, other: Affine) -> Affine:
        """Return the values of `self` where `condition` is true and those of `other` elsewhere."""
        pairs = zip((self.scale, self.point, self.offset), (other.scale, other.point, other.offset))
        return Affine(*(torch.where(condition, mine, theirs) for mine, theirs in pairs))


@dataclass(frozen=True)
class Part:
    """Groups of equal width in some rows of a matrix, as slices of rows, columns and groups."""

    rows: slice
    columns: slice
    groups: slice
    width: int

    def of(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [rows, groups, width], a view if rows are contiguous."""
        return matrix[self.rows, self.columns].unflatten(1, (-1, self.width))


def parts(matrix: Tensor, grid: AffineGrid) -> Iterator[Part]:
    """Yield the matrix in panels of bounded size; the short last groups of the rows form separate parts."""
    n_out, n_in = matrix.shape
    width = grid.width(n_in)
    full, panel = n_in // width, _PANEL_CPU if matrix.device.type == "cpu" else _PANEL_GPU
    step = max(1, panel // n_in)
    for first in range(0, n_out, step):
        rows = slice(first, min(first + step, n_out))
        if full:
            yield Part(rows, slice(0, full * width), slice(0, full), width)
        if full * width < n_in:
            yield Part(rows, slice(full * width, n_in), slice(full, full + 1), n_in - full * width)


def affine_of(quantized: QuantizedGroups, grid: AffineGrid, part: Part) -> Affine:
    """Return scale, point and offset of a part's groups."""
    scale = quantized.scales[part.rows, part.groups]
    if quantized.zeros is None:
        return Affine(scale, torch.full_like(scale, 2 ** (grid.bits - 1)), torch.zeros_like(scale))
    zero = quantized.zeros[part.rows, part.groups]
    if grid.zero == "float":
        return Affine(scale, torch.zeros_like(scale), zero)
    return Affine(scale, zero, torch.zeros_like(scale))


def assign(x: Tensor, affine: Affine, grid: AffineGrid) -> Tensor:
    """Return the nearest codes, float32 [rows, groups, width]; ties go to the even code.

    With a scale of 0 every code is the group's point.
    """
    inverse = reciprocal(affine.scale).unsqueeze(-1)
    shifted = x - affine.offset.unsqueeze(-1) if grid.zero == "float" else x
    codes = (shifted * inverse).add_(affine.point.unsqueeze(-1))
    return codes.round_().clamp_(0, grid.top)


def reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale, or 0 where that would overflow."""
    return torch.where(scale.abs() < _SMALLEST_SCALE, 0.0, scale.reciprocal())


def values(codes: Tensor, affine: Affine, grid: AffineGrid) -> Tensor:
    """Return the values the loader computes from codes (float32 or uint8 [rows, groups, width])."""
    product = (codes - affine.point.unsqueeze(-1)).mul_(affine.scale.unsqueeze(-1))
    product = round_to(product, grid.product_dtype)
    if grid.zero == "float":
        product = product + affine.offset.unsqueeze(-1)
    return round_to(product, grid.value_dtype)


def dequantize(quantized: QuantizedGroups, grid: AffineGrid) -> Tensor:
    """Return what the container's loader computes: float32 [out, in] holding values of the grid's value dtype."""
    out = torch.empty(quantized.codes.shape, dtype=torch.float32, device=quantized.codes.device)
    for part in parts(quantized.codes, grid):
        part.of(out).copy_(values(part.of(quantized.codes), affine_of(quantized, grid, part), grid))
    return out
