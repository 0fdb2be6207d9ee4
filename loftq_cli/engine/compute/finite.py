"""Find matrices that hold NaN or infinity, which cannot be quantized and would make their block's scale useless."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.checkpoint import Checkpoint
from loftq_cli.planning.plan import Plan
from loftq_cli.progress import Reporter


@dataclass(frozen=True)
class Nonfinite:
    """The first non-finite number of a matrix, at `index` ([row, column] as stored on disk)."""

    value: float
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.value} at {list(self.index)}"


def first_nonfinite(weight: Tensor) -> Nonfinite | None:
    """Return the first NaN or infinity of a float tensor, row by row, or None."""
    weight = weight.float() if weight.dtype is torch.float64 else weight  # matrices are quantized from float32
    # A finite sum proves that every element is finite, in one pass without a mask; overflow is ruled out below.
    if bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        return None
    finite = torch.isfinite(weight)
    if bool(finite.all()):
        return None
    index = tuple(int(i) for i in (~finite).nonzero()[0])
    return Nonfinite(float(weight[index]), index)


def find_nonfinite(plan: Plan, checkpoint: Checkpoint, reporter: Reporter) -> dict[str, str]:
    """Return the first NaN or infinity of each matrix that holds any, by tensor name. Reads every matrix once."""
    reporter.checking(plan)
    found = {}
    for unit in sorted(plan.matrices, key=lambda unit: (unit.source.file, unit.source.start)):
        bad = first_nonfinite(unit.read(checkpoint))
        if bad is not None:
            found[unit.tensor] = str(bad)
    return found
