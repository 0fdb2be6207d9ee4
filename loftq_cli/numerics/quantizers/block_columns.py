"""Codebook grids, column by column (`numerics.quantizers.columns`), in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks, midpoints, round_to
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.grids.nested import NestedScales, quantize_scales
from loftq_cli.numerics.quantizers.block_scales import fit_levels, fit_scales, reciprocal
from loftq_cli.numerics.quantizers.columns import Columns, Moved, Sweep


@dataclass(frozen=True)
class BlockColumns:
    """A `columns.ColumnQuantizer` of a codebook grid.

    Scales are fitted to a block's targets when the block begins, in later sweeps from those of the sweep before. Where
    they cannot be, because a block continues in the next row or because the container quantizes scales together, all
    are fitted to the whole matrix before the sweep.

    Attributes:
        levels: float32 [2**bits], fitted to the matrix; None for those of the codebook.
    """

    grid: BlockGrid
    levels: Tensor | None = None

    def sweep(self, weight: Tensor, column_weight: Tensor, before: Quantized | None) -> Sweep:
        if not self._fits_blocks(weight.shape[1]):
            return self._frozen(weight, column_weight)
        n_out, n_in = weight.shape
        scales = weight.new_empty(n_out, -(-n_in // self.grid.block_size))
        start = None if before is None else _blocks(before).absmax.view(n_out, -1)
        return BlockSweep(self, scales, torch.empty_like(weight, dtype=torch.uint8), n_in, start)

    def learn(self, target: Tensor, quantized: Quantized, column_weight: Tensor) -> BlockColumns:
        if not self.grid.codebook.fitted:
            return self
        return replace(self, levels=fit_levels(target, _blocks(quantized), self.grid, column_weight))

    def parameters(self, quantized: Quantized, columns: Columns) -> tuple[Tensor, ...]:
        found = _blocks(quantized)
        if found.nested is not None or not self._fits_blocks(found.codes.shape[1]):
            return ()
        return (self.looked_up(found.codes[:, columns.slice]),)

    def move(self, quantized: Quantized, columns: Columns, parameter: int, change: Tensor) -> Moved:
        found = _blocks(quantized)
        before = self._scales(found)[:, columns.start // self.grid.block_size].clone()
        after = round_to(before + change, self.grid.scale_dtype)
        if not self.grid.signed:
            after = torch.where(after > 0, after, before)
        return Moved(before, after, self.values(found.codes[:, columns.slice], after.unsqueeze(1)))

    def put(self, quantized: Quantized, columns: Columns, parameter: int, numbers: Tensor) -> None:
        self._scales(_blocks(quantized))[:, columns.start // self.grid.block_size] = numbers

    def used_levels(self, device: torch.device) -> Tensor:
        """Return the levels, float32 [2**bits]."""
        return self.grid.levels(device) if self.levels is None else self.levels

    def own_levels(self, device: torch.device) -> Tensor | None:
        """Return the levels that are stored with the matrix; None if the container knows them."""
        return self.used_levels(device) if self.grid.codebook.fitted else None

    def looked_up(self, codes: Tensor) -> Tensor:
        """Return the level of every code."""
        return self.used_levels(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the values the loader computes, for scales that broadcast to the codes."""
        return round_to(self.looked_up(codes) * scales, self.grid.value_dtype)

    def fit(self, target: Tensor, column_weight: Tensor, start: Tensor | None) -> Tensor:
        """Return scales [out] for the targets of one block, [out, width]; `start` are those of an earlier sweep."""
        rows, levels = replace(self.grid, layout="rows"), self.used_levels(target.device)
        guards = start is None
        return fit_scales(target, rows, levels, previous=start, column_weight=column_weight, guards=guards)

    def _fits_blocks(self, n_in: int) -> bool:
        return not self.grid.nested and (self.grid.layout == "rows" or n_in % self.grid.block_size == 0)

    def _scales(self, found: QuantizedBlocks) -> Tensor:
        return found.absmax.view(found.codes.shape[0], -1)

    def _frozen(self, weight: Tensor, column_weight: Tensor) -> FrozenSweep:
        grid = self.grid
        scales = fit_scales(weight, grid, self.used_levels(weight.device), column_weight=column_weight)
        nested = quantize_scales(scales) if grid.nested else None
        scales = scales if nested is None else nested.dequantized()
        return FrozenSweep(self, scales, nested, torch.empty_like(weight, dtype=torch.uint8), weight.shape[1])


@dataclass
class BlockSweep:
    """A `columns.Sweep` over rows that are sequences of blocks; `scales` and `start` [out, blocks]."""

    quantizer: BlockColumns
    scales: Tensor
    codes: Tensor
    n_in: int
    start: Tensor | None
    tile: int = 1

    @property
    def block(self) -> int:
        return self.quantizer.grid.block_size

    def begin_block(self, columns: Columns, target: Tensor, weight: Tensor) -> None:
        number = columns.start // self.block
        start = None if self.start is None else self.start[:, number].contiguous()
        self.scales[:, number] = self.quantizer.fit(target.contiguous(), weight, start)

    def quantize(self, columns: Columns, target: Tensor) -> Tensor:
        return _nearest(self.quantizer, target, self.scales[:, columns.start // self.block, None], columns, self.codes)

    def quantized(self) -> QuantizedBlocks:
        return QuantizedBlocks(self.codes, self.scales.reshape(-1), self.quantizer.own_levels(self.codes.device))


@dataclass
class FrozenSweep:
    """A `columns.Sweep` with scales [n_blocks] that were chosen beforehand, for blocks over the flattened matrix."""

    quantizer: BlockColumns
    scales: Tensor
    nested: NestedScales | None
    codes: Tensor
    n_in: int
    tile: int = 1

    @property
    def block(self) -> int:
        return self.quantizer.grid.block_size

    def begin_block(self, columns: Columns, target: Tensor, weight: Tensor) -> None:
        """The scales are known."""

    def quantize(self, columns: Columns, target: Tensor) -> Tensor:
        return _nearest(self.quantizer, target, self._scales(columns), columns, self.codes)

    def quantized(self) -> QuantizedBlocks:
        return QuantizedBlocks(self.codes, self.scales, self.quantizer.own_levels(self.codes.device), self.nested)

    def _scales(self, columns: Columns) -> Tensor:
        """Return the scale of every element, [out, width]."""
        rows = torch.arange(self.codes.shape[0], device=self.codes.device).unsqueeze(1)
        places = torch.arange(columns.start, columns.stop, device=self.codes.device)
        grid = self.quantizer.grid
        if grid.layout == "rows":
            return self.scales[rows * -(-self.n_in // grid.block_size) + places // grid.block_size]
        return self.scales[(rows * self.n_in + places) // grid.block_size]


def _nearest(quantizer: BlockColumns, target: Tensor, scales: Tensor, columns: Columns, codes: Tensor) -> Tensor:
    """Store the codes of the nearest levels in `codes` and return their values."""
    levels = quantizer.used_levels(target.device)
    found = torch.bucketize(target * reciprocal(scales), midpoints(levels), out_int32=True)
    codes[:, columns.slice] = found.to(torch.uint8)
    return round_to(levels.index_select(0, found.reshape(-1)).view(found.shape) * scales, quantizer.grid.value_dtype)


def _blocks(quantized: Quantized) -> QuantizedBlocks:
    assert isinstance(quantized, QuantizedBlocks), "blocks belong to a codebook grid"
    return quantized
