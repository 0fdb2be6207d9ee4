"""Group-wise integer quantization on a container's own grid: Q = scale · (code - zero), or scale · code + offset.

An `AffineGrid` says everything that decides the bytes: code range, group, what the zero is, the dtypes scale and zero
are stored in, and the dtypes the loader rounds the product and the value to. `dequantize` computes what the container's
loader computes, bit for bit. How scales and zeros are found stands in `numerics.affine_fit`.
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

_SMALLEST_SCALE = 1e-37  # below, the reciprocal overflows float32

# Elements worked on at a time: the temporaries of one step fit the cache, and memory stays bounded.
_PANEL_CPU, _PANEL_GPU = 2**18, 2**24


@dataclass(frozen=True)
class AffineGrid:
    """How a container holds a matrix [out, in] as integers.

    Attributes:
        bits: width of a code; codes run from 0 to 2**bits - 1.
        group_size: elements of a row that share scale and zero; 0 is the whole row. The last group of a row may be
            shorter.
        zero: `none` is a fixed zero of 2**(bits - 1), so that values are scale · (-2**(bits-1) … 2**(bits-1) - 1) and
            the scale may be negative; `integer` is a code from `least_zero` on; `float` is an offset, the value of code
            0, so that values are scale · code + offset.
        scale_dtype: dtype of the stored scale; `zero_dtype`: of the stored offset (`float` only).
        product_dtype: dtype the loader rounds scale · (code - zero) to.
        value_dtype: dtype the loader then rounds the value to. Products and sums are taken in float32.
        scale_rule: how scales are chosen (see `numerics.affine_fit`).
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
        """The name of the levels, as a recipe calls them."""
        return "int"

    @property
    def block_size(self) -> int:
        """Elements that share a scale; 0 is the whole row."""
        return self.group_size

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def width(self, in_features: int) -> int:
        """Elements of a full group in a row of this length."""
        return self.group_size or in_features

    def n_blocks(self, out_features: int, in_features: int) -> int:
        """How many scales a matrix of this shape has."""
        return out_features * -(-in_features // self.width(in_features))

    def information_bits(self, out_features: int, in_features: int) -> int:
        """Bits that codes, scales and zeros carry."""
        zero_bits = {"none": 0, "integer": self.bits, "float": 8 * self.zero_dtype.itemsize}[self.zero]
        group_bits = 8 * self.scale_dtype.itemsize + zero_bits
        return out_features * in_features * self.bits + self.n_blocks(out_features, in_features) * group_bits


@dataclass(frozen=True)
class QuantizedGroups:
    """Codes uint8 [out, in]; scales and zeros float32 [out, groups], holding values of their stored dtypes.

    `zeros` are zero points, or offsets where the grid's zero is `float`; None where it is `none`.
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
        """This where `condition` holds, `other` elsewhere."""
        pairs = zip((self.scale, self.point, self.offset), (other.scale, other.point, other.offset))
        return Affine(*(torch.where(condition, mine, theirs) for mine, theirs in pairs))


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix and those of their groups that have one width: rows, columns and groups as slices."""

    rows: slice
    columns: slice
    groups: slice
    width: int

    def of(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [rows, groups, width], a view where rows are contiguous."""
        return matrix[self.rows, self.columns].unflatten(1, (-1, self.width))


def parts(matrix: Tensor, grid: AffineGrid) -> Iterator[Part]:
    """The matrix in panels of bounded size; a short last group of each row comes as a part of its own."""
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
    """Scale, point and offset of a part's groups."""
    scale = quantized.scales[part.rows, part.groups]
    if quantized.zeros is None:
        return Affine(scale, torch.full_like(scale, 2 ** (grid.bits - 1)), torch.zeros_like(scale))
    zero = quantized.zeros[part.rows, part.groups]
    if grid.zero == "float":
        return Affine(scale, torch.zeros_like(scale), zero)
    return Affine(scale, zero, torch.zeros_like(scale))


def assign(x: Tensor, affine: Affine, grid: AffineGrid) -> Tensor:
    """The nearest codes, as float32 [rows, groups, width]; a tie takes the even one. A scale of 0 gives the code whose
    value is the group's point."""
    inverse = reciprocal(affine.scale).unsqueeze(-1)
    shifted = x - affine.offset.unsqueeze(-1) if grid.zero == "float" else x
    codes = (shifted * inverse).add_(affine.point.unsqueeze(-1))
    return codes.round_().clamp_(0, grid.top)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that would overflow."""
    return torch.where(scale.abs() < _SMALLEST_SCALE, 0.0, scale.reciprocal())


def values(codes: Tensor, affine: Affine, grid: AffineGrid) -> Tensor:
    """What the loader makes of codes (float32 or uint8 [rows, groups, width])."""
    product = (codes - affine.point.unsqueeze(-1)).mul_(affine.scale.unsqueeze(-1))
    product = round_to(product, grid.product_dtype)
    if grid.zero == "float":
        product = product + affine.offset.unsqueeze(-1)
    return round_to(product, grid.value_dtype)


def dequantize(quantized: QuantizedGroups, grid: AffineGrid) -> Tensor:
    """What the container's loader gives: float32 [out, in] holding values of the grid's value dtype."""
    out = torch.empty(quantized.codes.shape, dtype=torch.float32, device=quantized.codes.device)
    for part in parts(quantized.codes, grid):
        part.of(out).copy_(values(part.of(quantized.codes), affine_of(quantized, grid, part), grid))
    return out
