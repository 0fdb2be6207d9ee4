"""Quantize a matrix column by column, so that the error of a column can be added to the targets of later ones.

`numerics.methods.ldlq` runs from the first column to the last. It knows nothing of grids: a `ColumnQuantizer` chooses
scales and codes, and the caller computes every target. Two widths describe a quantizer:

* `block`: columns that share parameters (scales, zeros). They are chosen when the block begins, from its targets.
* `tile`: columns whose codes are chosen together: 1 on a scalar grid, more for codes that span several columns.
  Within a tile there is no feedback.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loftq_cli.numerics.grids.grid import Grid, Quantized


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `stop` of the matrix, which all belong to one block."""

    start: int
    stop: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def width(self) -> int:
        return self.stop - self.start

    def pieces(self, width: int) -> Iterator[Columns]:
        """Yield them in pieces of this width; the last one may be narrower."""
        for start in range(self.start, self.stop, width):
            yield Columns(start, min(start + width, self.stop))


class Sweep(Protocol):
    """One pass over a matrix [out, in]; it holds the codes and parameters chosen so far.

    Attributes:
        block: columns that share parameters; blocks begin at its multiples.
        tile: columns whose codes are chosen together; a divisor of `block`, or equal to it.
        codes: uint8 [out, in]; or more bytes a weight, if one does not hold a code.
    """

    @property
    def block(self) -> int: ...

    @property
    def tile(self) -> int: ...

    @property
    def codes(self) -> Tensor: ...

    def begin_block(self, columns: Columns, target: Tensor, weight: Tensor) -> None:
        """Choose the parameters of a block.

        Args:
            target: float32 [out, width], the targets of the block before errors inside it are fed back.
            weight: float32 [width], positive: the weight of a column's squared error, which is the variance of its
                input given the inputs of all later tiles.
        """

    def quantize(self, columns: Columns, target: Tensor) -> Tensor:
        """Choose the codes of one tile for `target` [out, tile] and return its values as the loader computes them."""

    def quantized(self) -> Quantized:
        """Return the codes and parameters of the whole matrix; called when all columns are quantized."""


@runtime_checkable
class FusedSweep(Sweep, Protocol):
    """A sweep that does the tiles of a run of columns by itself, feedback included."""

    def quantize_columns(self, columns: Columns, target: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        """Do what `quantize_by_tiles` does."""


@runtime_checkable
class JointSweep(Sweep, Protocol):
    """A sweep whose codes in one row decide values in others: groups of rows keep or change their codes together."""

    @property
    def joint_rows(self) -> int:
        """The number of rows in a group; the last group may have fewer."""


class ColumnQuantizer(Protocol):
    """Makes sweeps over matrices on one grid."""

    @property
    def grid(self) -> Grid:
        """The container's grid."""

    def sweep(self, weight: Tensor, column_weight: Tensor, before: Quantized | None) -> Sweep:
        """Return a new sweep.

        Args:
            weight: float32 [out, in], the matrix that is about to be quantized. A container whose scales depend on each
                other chooses all of them from it.
            column_weight: float32 [in], as in `Sweep.begin_block`.
            before: the result of an earlier sweep over a similar matrix, whose parameters may be a start.
        """

    def learn(self, target: Tensor, quantized: Quantized, column_weight: Tensor) -> ColumnQuantizer:
        """Return the quantizer for the next sweep: its levels may be fitted to the targets of the last one.

        Args:
            target: float32 [out, in], the targets of the last sweep, with all feedback.
            quantized: its result.
        """

    def parameters(self, quantized: Quantized, columns: Columns) -> tuple[Tensor, ...]:
        """Return ∂Q/∂p [out, width] of a block for each of its parameters p, with codes fixed; () if they are fixed."""

    def move(self, quantized: Quantized, columns: Columns, parameter: int, change: Tensor) -> Moved:
        """Add `change` [out] to one of a block's parameters, and round the sum as it is stored."""

    def put(self, quantized: Quantized, columns: Columns, parameter: int, numbers: Tensor) -> None:
        """Replace a parameter of a block by `numbers` [out], those of a `Moved`, in place."""


@dataclass(frozen=True)
class Moved:
    """Another choice of one parameter of a block: `before` and `after` float32 [out], and the values [out, width] that
    the loader computes with the latter."""

    before: Tensor
    after: Tensor
    values: Tensor


def quantize_by_tiles(sweep: Sweep, columns: Columns, target: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
    """Quantize a run of columns tile by tile, and add each tile's error to the targets that follow.

    Args:
        target: float32 [out, width], with the errors of all columns before the run; the targets with all feedback are
            written into it.
        weight: float32 [out, width], what the values stand for: the error that is fed back is weight - values.
        feedback: float32 [width, width]: entry [i, j] is the share of column i's error that column j's target takes; 0
            unless j's tile is after i's.

    Returns:
        the values, float32 [out, width].
    """
    values = torch.empty_like(target)
    for tile in Columns(0, columns.width).pieces(sweep.tile):
        place = Columns(columns.start + tile.start, columns.start + tile.stop)
        values[:, tile.slice] = sweep.quantize(place, target[:, tile.slice])
        for j in range(tile.start, tile.stop):
            # A product and a sum, each rounded, as in the compiled twin.
            error = weight[:, j] - values[:, j]
            target[:, tile.stop :] += error.unsqueeze(1) * feedback[j, tile.stop :]
    return values
