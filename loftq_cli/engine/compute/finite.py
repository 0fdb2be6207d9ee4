"""Which matrices hold NaN or infinity: nothing can be quantized to them, and one spoils its block's scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.checkpoint import Checkpoint
from loftq_cli.planning.plan import Plan
from loftq_cli.progress import Reporter


@dataclass(frozen=True)
class Nonfinite:
    """The first such number of a matrix, at `index` ([row, column] as it lies on the disk)."""

    value: float
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.value} at {list(self.index)}"


def first_nonfinite(weight: Tensor) -> Nonfinite | None:
    """The first NaN or infinity of a float tensor, row by row; None where there is none."""
    weight = weight.float() if weight.dtype is torch.float64 else weight  # what it is quantized from
    # A sum is finite only if every element is, and costs one pass without a mask; overflow is told apart below.
    if bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        return None
    finite = torch.isfinite(weight)
    if bool(finite.all()):
        return None
    index = tuple(int(i) for i in (~finite).nonzero()[0])
    return Nonfinite(float(weight[index]), index)


def find_nonfinite(plan: Plan, checkpoint: Checkpoint, reporter: Reporter) -> dict[str, str]:
    """The plan's matrices that hold NaN or infinity, by tensor, with the first one's place; reads each matrix once."""
    reporter.checking(plan)
    found = {}
    for unit in sorted(plan.matrices, key=lambda unit: (unit.source.file, unit.source.start)):
        bad = first_nonfinite(unit.read(checkpoint))
        if bad is not None:
            found[unit.tensor] = str(bad)
    return found
