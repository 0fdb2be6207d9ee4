"""The two half-steps of LDLQ on codes: one sweep over the columns, and new parameters for fixed codes.

See `numerics.methods.ldlq_metric` for the metric, and `numerics.quantizers.columns` for how a grid takes part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.deterministic import product
from loftq_cli.numerics.lowrank.truncate import half_is_faster
from loftq_cli.numerics.methods.ldlq_metric import Eased
from loftq_cli.numerics.quantizers.columns import (
    ColumnQuantizer,
    Columns,
    FusedSweep,
    JointSweep,
    Sweep,
    quantize_by_tiles,
)

RUN = 64  # columns whose errors are fed back one by one; later columns receive them as one product
_PANEL = 512  # columns that receive the errors of all earlier ones as one product
_TINY = 1e-30


@dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Attributes:
        values: Q, float32 [out, in].
        target: what each column was rounded from, float32 [out, in].
    """

    quantized: Quantized
    values: Tensor
    target: Tensor


def sweep_columns(weight: Tensor, sweep: Sweep, quantizer: ColumnQuantizer, eased: Eased) -> Swept:
    """Quantize `weight` X, float32 [out, in], from the first column to the last, with errors fed back."""
    errors, values, target = (torch.empty_like(weight, dtype=dtype) for dtype in (_fed_dtype(weight), None, None))
    swept = _Sweeping(weight, sweep, quantizer, eased, errors, values, target)
    for panel in _panels(weight.shape[1], sweep.block):
        swept.do_panel(panel)
    return Swept(sweep.quantized(), swept.values, swept.target)


def _panels(width: int, block: int) -> Iterator[Columns]:
    """Yield the columns in whole blocks, about `_PANEL` at a time."""
    return Columns(0, width).pieces(max(1, _PANEL // block) * block)


@dataclass(frozen=True)
class _Sweeping:
    """A sweep in progress; `errors` is X - Q of the columns done so far."""

    weight: Tensor
    sweep: Sweep
    quantizer: ColumnQuantizer
    eased: Eased
    errors: Tensor
    values: Tensor
    target: Tensor

    def do_panel(self, panel: Columns) -> None:
        """Quantize a panel: the errors of all earlier columns reach it as one product."""
        feedback = self.eased.feedback(panel, self.sweep.tile)
        before = slice(0, panel.start)
        base = self.weight[:, panel.slice] + _multiply(self.errors[:, before], feedback[before])
        errors = torch.empty_like(base)
        variances = self.eased.variances(panel, self.sweep.tile)
        for block in panel.pieces(self.sweep.block):
            inside = slice(block.start - panel.start, block.stop - panel.start)
            done = slice(panel.start, block.start)
            target = torch.addmm(base[:, inside], errors[:, : inside.start], feedback[done, inside])
            self.sweep.begin_block(block, target, variances[inside])
            errors[:, inside] = self._do_block(block, target, feedback[block.slice, inside])
        self.errors[:, panel.slice] = errors

    def _do_block(self, block: Columns, start: Tensor, feedback: Tensor) -> Tensor:
        """Choose a block's codes, then its parameters for these codes, then its codes again; return X - Q."""
        weight = self.weight[:, block.slice].contiguous()
        first = self._quantize(block, start.clone(), weight, feedback)
        settled = self._settle(block, start, weight, feedback, first) if block.width <= RUN else first
        self.values[:, block.slice], self.target[:, block.slice] = settled.values, settled.target
        return weight - settled.values

    def _quantize(self, block: Columns, target: Tensor, weight: Tensor, feedback: Tensor) -> _Block:
        values = torch.empty_like(target)
        quantize = (
            self.sweep.quantize_columns
            if isinstance(self.sweep, FusedSweep)
            else partial(quantize_by_tiles, self.sweep)
        )
        for run in Columns(0, block.width).pieces(RUN):
            here, earlier = run.slice, slice(0, run.start)
            if run.start:
                target[:, here] += (weight[:, earlier] - values[:, earlier]) @ feedback[earlier, here]
            place = Columns(block.start + run.start, block.start + run.stop)
            values[:, here] = quantize(place, target[:, here], weight[:, here], feedback[here, here])
        return _Block(target, values)

    def _settle(self, block: Columns, start: Tensor, weight: Tensor, feedback: Tensor, first: _Block) -> _Block:
        """Fit the parameters to the codes under all feedback, choose the codes again, and keep what is better by row.

        The block's part of E M' is the difference between targets and values, times the tiles' corners of M'.
        """
        quantized, corner = self.sweep.quantized(), self.eased.root[block.slice, block.slice]
        codes = self.sweep.codes[:, block.slice].clone()
        left = first.remaining(corner, self.sweep.tile)
        cost, moved = left.square().sum(dim=1), []
        for number, direction in enumerate(self.quantizer.parameters(quantized, block)):
            image = direction @ corner
            change = _best_change((left * image).sum(dim=1), image.square().sum(dim=1))
            moved.append(self.quantizer.move(quantized, block, number, change))
            self.quantizer.put(quantized, block, number, moved[-1].after)
            left = left - image * (moved[-1].after - moved[-1].before).unsqueeze(1)
        if not moved:
            return first
        second = self._quantize(block, start.clone(), weight, feedback)
        joint = self.sweep.joint_rows if isinstance(self.sweep, JointSweep) else 1
        better = _lower(second.remaining(corner, self.sweep.tile).square().sum(dim=1), cost, joint)
        for number, change_made in enumerate(moved):
            chosen = torch.where(better, change_made.after, change_made.before)
            self.quantizer.put(quantized, block, number, chosen)
        rows = better.unsqueeze(1)
        self.sweep.codes[:, block.slice] = torch.where(rows, self.sweep.codes[:, block.slice], codes)
        return _Block(torch.where(rows, second.target, first.target), torch.where(rows, second.values, first.values))


@dataclass(frozen=True)
class _Block:
    """Targets with all feedback, and values, of a block, float32 [out, width]."""

    target: Tensor
    values: Tensor

    def remaining(self, corner: Tensor, tile: int) -> Tensor:
        """Return the block's columns of E M', for its corner of M'."""
        difference = self.target - self.values
        if tile == 1:
            return difference * corner.diagonal()
        tiles = torch.arange(corner.shape[0], device=corner.device) // tile
        return difference @ torch.where(tiles.unsqueeze(1) == tiles, corner, 0.0)


def _lower(cost: Tensor, before: Tensor, joint: int) -> Tensor:
    """Return where costs [out] are lower than before, compared in sums over groups of `joint` rows."""
    if joint == 1:
        return cost < before
    pad = -cost.numel() % joint
    sums = (F.pad(cost - before, (0, pad))).view(-1, joint).sum(dim=1)
    return (sums < 0).repeat_interleave(joint)[: cost.numel()]


def _best_change(slope: Tensor, curve: Tensor) -> Tensor:
    return torch.where(curve > 0, slope / curve.clamp(min=_TINY), 0.0)


def _fed_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which errors are fed back: bfloat16 where products are faster in it.

    An error of 2⁻⁹ in the part of a target that makes up for others changes codes only if they were nearly ties.
    """
    return torch.bfloat16 if half_is_faster(weight) else torch.float32


def _multiply(errors: Tensor, factor: Tensor) -> Tensor:
    """Return errors [out, k] times a float32 factor [k, width], multiplied in the errors' dtype, in float32."""
    return product(errors, factor.to(errors.dtype)).float() if errors.shape[1] else errors.float() @ factor


def refit(swept: Swept, weight: Tensor, quantizer: ColumnQuantizer, block: int, eased: Eased) -> Swept:
    """Change the parameters of every block, from the first to the last, so that ‖E M'‖ falls with fixed codes.

    For one parameter with Q's derivative D [out, width], the best change is ⟨E H', D⟩ / ⟨D H', D⟩ by row, both over the
    block's columns. It is rounded as the container stores it, and taken over in the rows where ‖E M'‖ then falls. The
    product E H' is computed for a panel of blocks and then corrected for the changes inside the panel.
    """
    values, quantized = swept.values, swept.quantized
    errors = weight - values
    absorbed, errors = errors @ eased.absorbed, errors.to(_fed_dtype(weight))
    for panel in _panels(weight.shape[1], block):
        slope = _multiply(errors, eased.matrix[:, panel.slice])
        slope.addmm_(absorbed, eased.absorbed[panel.slice].T, alpha=-1)
        square = eased.square(panel.slice)
        for columns in panel.pieces(block):
            inside = slice(columns.start - panel.start, columns.stop - panel.start)
            rest = slice(inside.start, panel.width)
            before = values[:, columns.slice]
            after = _refit_block(before, quantized, columns, quantizer, slope[:, rest], square[inside, rest])
            absorbed.addmm_(after - before, eased.absorbed[columns.slice], alpha=-1)
            errors[:, columns.slice] = weight[:, columns.slice] - after
            values[:, columns.slice] = after
    return Swept(quantized, values, swept.target)


def _refit_block(
    values: Tensor, quantized: Quantized, columns: Columns, quantizer: ColumnQuantizer, slope: Tensor, square: Tensor
) -> Tensor:
    """Change one block's parameters and return its new values.

    Args:
        values: of the block, float32 [out, width].
        slope: E H' from the block's first column to the panel's last, [out, rest]; it is updated.
        square: H' of the block with the same columns, [width, rest].
    """
    corner, width = square[:, : columns.width], columns.width
    for number, direction in enumerate(quantizer.parameters(quantized, columns)):
        curve = ((direction @ corner) * direction).sum(dim=1)
        change = _best_change((slope[:, :width] * direction).sum(dim=1), curve)
        moved = quantizer.move(quantized, columns, number, change)
        step = moved.values - values
        cost = ((step @ corner) * step).sum(dim=1) - 2 * (step * slope[:, :width]).sum(dim=1)
        better = cost < 0
        quantizer.put(quantized, columns, number, torch.where(better, moved.after, moved.before))
        rows = better.unsqueeze(1)
        slope.addmm_(torch.where(rows, step, 0.0), square, alpha=-1)
        values = torch.where(rows, moved.values, values)
    return values
