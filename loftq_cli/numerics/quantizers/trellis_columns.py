"""Trellis grids, sixteen columns at a time (`numerics.quantizers.columns`), on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids.blocks import QuantizedBlocks, round_to
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.grids.trellis import TILE, TrellisGrid, values
from loftq_cli.numerics.quantizers import viterbi
from loftq_cli.numerics.quantizers.columns import Columns, Moved, Sweep
from loftq_cli.numerics.quantizers.trellis import TrellisPanel
from loftq_cli.numerics.quantizers.viterbi import Encode


@dataclass(frozen=True)
class TrellisColumns:
    """A `columns.ColumnQuantizer` of a trellis grid, with tiles of sixteen columns.

    The first sweep starts from the blocks' root mean square, for which the table is made, and later ones from the
    scales of the last; the caller then fits them to the codes.
    """

    grid: TrellisGrid
    encode: Encode = viterbi.encode

    def sweep(self, weight: Tensor, column_weight: Tensor, before: Quantized | None) -> Sweep:
        n_out, n_in = weight.shape
        scales = weight.new_empty(n_out, self.grid.n_blocks(1, n_in))
        earlier = None if before is None else _blocks(before).absmax.view(scales.shape)
        return TrellisSweep(self, scales, torch.empty_like(weight, dtype=torch.uint8), earlier, column_weight)

    def learn(self, target: Tensor, quantized: Quantized, column_weight: Tensor) -> TrellisColumns:
        return self

    def parameters(self, quantized: Quantized, columns: Columns) -> tuple[Tensor, ...]:
        return (values(_blocks(quantized).codes[:, columns.slice], self.grid),)

    def move(self, quantized: Quantized, columns: Columns, parameter: int, change: Tensor) -> Moved:
        found = _blocks(quantized)
        before = _scales(found)[:, columns.start // self.grid.block_size].clone()
        after = round_to(before + change, self.grid.scale_dtype)
        after = torch.where(after > 0, after, before)
        moved = values(found.codes[:, columns.slice], self.grid) * after.unsqueeze(1)
        return Moved(before, after, round_to(moved, self.grid.value_dtype))

    def put(self, quantized: Quantized, columns: Columns, parameter: int, numbers: Tensor) -> None:
        _scales(_blocks(quantized))[:, columns.start // self.grid.block_size] = numbers

    def panel(self, target: Tensor, weight: Tensor) -> TrellisPanel:
        """Return some whole tiles of a target, [out, width], with the weights of its columns."""
        return TrellisPanel(target, self.grid, self.grid.table(target.device), weight, self.encode)


@dataclass
class TrellisSweep:
    """A `columns.JointSweep` by tiles.

    Attributes:
        scales, earlier: of this sweep and of the last, [out, blocks].
        weight: of the columns of the block at hand, [width].
    """

    quantizer: TrellisColumns
    scales: Tensor
    codes: Tensor
    earlier: Tensor | None
    weight: Tensor
    tile: int = TILE
    joint_rows: int = TILE

    @property
    def block(self) -> int:
        return self.quantizer.grid.block_size

    def begin_block(self, columns: Columns, target: Tensor, weight: Tensor) -> None:
        here = columns.start // self.block
        self.weight = weight
        start = self.quantizer.panel(target, weight).start() if self.earlier is None else self.earlier[:, here, None]
        self.scales[:, here] = start[:, 0]

    def quantize(self, columns: Columns, target: Tensor) -> Tensor:
        scales = self.scales[:, columns.start // self.block, None]
        first = columns.start % self.block
        weight = self.weight[first : first + columns.width]
        codes = self.quantizer.panel(target, weight).assign(scales)
        self.codes[:, columns.slice] = codes
        return round_to(values(codes, self.quantizer.grid) * scales, self.quantizer.grid.value_dtype)

    def quantized(self) -> QuantizedBlocks:
        return QuantizedBlocks(self.codes, self.scales.reshape(-1))


def _blocks(quantized: Quantized) -> QuantizedBlocks:
    assert isinstance(quantized, QuantizedBlocks), "a trellis has codes and scales"
    return quantized


def _scales(found: QuantizedBlocks) -> Tensor:
    return found.absmax.view(found.codes.shape[0], -1)
