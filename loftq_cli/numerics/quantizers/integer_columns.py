"""Integer grids, column by column (`numerics.quantizers.columns`), in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loftq_cli.numerics.grids.affine import Affine, AffineGrid, QuantizedGroups, assign, values
from loftq_cli.numerics.grids.blocks import round_to
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.quantizers.columns import Columns, Moved, Sweep
from loftq_cli.numerics.quantizers.integer import AffineQuantizer

SCALE, ZERO = range(2)  # the parameters of a group


@dataclass(frozen=True)
class IntegerColumns:
    """A `columns.ColumnQuantizer` of an integer grid.

    Scales and zeros have the least squared error on a group's targets when the group begins, whatever the grid's rule.
    Later, scales and float zeros change with fixed codes, by the weights of LDLQ's metric; integer zeros stay.
    """

    grid: AffineGrid

    def fit(self, target: Tensor) -> QuantizedGroups:
        """Return scales and zeros [out, 1] for the targets of one group, [out, width]."""
        found = AffineQuantizer(self.grid).quantize_fitted(target, target).quantized
        return _groups(found)

    def sweep(self, weight: Tensor, column_weight: Tensor, before: Quantized | None) -> Sweep:
        n_out, n_in = weight.shape
        scales = weight.new_empty(n_out, self.grid.n_blocks(1, n_in))
        zeros = None if self.grid.zero == "none" else torch.empty_like(scales)
        return IntegerSweep(self, torch.empty_like(weight, dtype=torch.uint8), scales, zeros)

    def learn(self, target: Tensor, quantized: Quantized, column_weight: Tensor) -> IntegerColumns:
        return self

    def parameters(self, quantized: Quantized, columns: Columns) -> tuple[Tensor, ...]:
        found = _groups(quantized)
        codes = found.codes[:, columns.slice].float()
        if self.grid.zero == "float":
            return codes, torch.ones_like(codes)
        return (codes - self.affine(found, columns).point,)

    def move(self, quantized: Quantized, columns: Columns, parameter: int, change: Tensor) -> Moved:
        found = _groups(quantized)
        now = self.affine(found, columns)
        before = (now.scale if parameter == SCALE else now.offset)[:, 0].clone()
        dtype = self.grid.scale_dtype if parameter == SCALE else self.grid.zero_dtype
        after = round_to(before + change, dtype)
        if parameter == SCALE and self.grid.zero != "none":
            after = torch.where(after > 0, after, before)
        then = replace(now, scale=after[:, None]) if parameter == SCALE else replace(now, offset=after[:, None])
        return Moved(before, after, self.values(found.codes[:, columns.slice], then))

    def put(self, quantized: Quantized, columns: Columns, parameter: int, numbers: Tensor) -> None:
        found = _groups(quantized)
        place = found.scales if parameter == SCALE else found.zeros
        assert place is not None, "a grid without zeros has one parameter"
        place[:, self._group(found, columns)] = numbers

    def affine(self, found: QuantizedGroups, columns: Columns) -> Affine:
        """Return scale, point and offset of the columns' group, [out, 1] each."""
        group = self._group(found, columns)
        scale = found.scales[:, group, None]
        if found.zeros is None:
            return Affine(scale, torch.full_like(scale, 2 ** (self.grid.bits - 1)), torch.zeros_like(scale))
        zero, none = found.zeros[:, group, None], torch.zeros_like(scale)
        return Affine(scale, none, zero) if self.grid.zero == "float" else Affine(scale, zero, none)

    def values(self, codes: Tensor, affine: Affine) -> Tensor:
        """Return the values that the loader computes from codes [out, width] of one group."""
        return values(codes.unsqueeze(1), affine, self.grid)[:, 0]

    def _group(self, found: QuantizedGroups, columns: Columns) -> int:
        return columns.start // self.grid.width(found.codes.shape[1])


@dataclass
class IntegerSweep:
    """A `columns.Sweep` over groups of integers; `scales` and `zeros` [out, groups]."""

    quantizer: IntegerColumns
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    tile: int = 1

    @property
    def block(self) -> int:
        return self.quantizer.grid.width(self.codes.shape[1])

    def begin_block(self, columns: Columns, target: Tensor, weight: Tensor) -> None:
        found, group = self.quantizer.fit(target), columns.start // self.block
        self.scales[:, group] = found.scales[:, 0]
        if self.zeros is not None:
            assert found.zeros is not None, "the grid has zeros"
            self.zeros[:, group] = found.zeros[:, 0]

    def quantize(self, columns: Columns, target: Tensor) -> Tensor:
        affine = self.quantizer.affine(self.quantized(), columns)
        codes = assign(target.unsqueeze(1), affine, self.quantizer.grid)
        self.codes[:, columns.slice] = codes[:, 0].to(torch.uint8)
        return values(codes, affine, self.quantizer.grid)[:, 0]

    def quantized(self) -> QuantizedGroups:
        return QuantizedGroups(self.codes, self.scales, self.zeros)


def _groups(quantized: Quantized) -> QuantizedGroups:
    assert isinstance(quantized, QuantizedGroups), "groups belong to an integer grid"
    return quantized
