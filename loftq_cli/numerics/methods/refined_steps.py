"""The low-rank steps of the refined method, most of which need little precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.truncate import (
    LowRank,
    frobenius,
    half_is_faster,
    half_low_rank,
    krylov_low_rank,
    refine,
)
from loftq_cli.numerics.methods.loftq import LowRankStep

# Powers of RᵀR: for the first step, in the loop, at the end in float32, and at the end in bfloat16 before the exact
# projection.
_START_DEPTH, _STEP_DEPTH, _END_DEPTH, _END_HALF_DEPTH = 3, 1, 3, 2

RoughStep = Callable[[Tensor, float, "LowRank | None"], "LowRank | None"]


@dataclass(frozen=True)
class LowRankSteps:
    """The low-rank step in the loop, and the more precise one of the last step, whose factors are stored.

    `rough` takes a residual and its norm; it replaces `step` in steps with feedback unless it returns None.
    """

    step: LowRankStep
    last: LowRankStep
    rough: RoughStep = lambda _residual, _norm, _previous: None


def shallow_steps(rank: int, generator: torch.Generator) -> LowRankSteps:
    """Return the default: one power per step, as errors in BA only become part of the next target; more at the end."""

    def rough(residual: Tensor, norm: float, previous: LowRank | None, deep: int = _STEP_DEPTH) -> LowRank | None:
        if not half_is_faster(residual):
            return None
        depth = _START_DEPTH if previous is None else deep
        return half_low_rank(
            residual.bfloat16(), rank, previous=previous, depth=depth, generator=generator, norm=norm, rough=True
        )

    def step(residual: Tensor, previous: LowRank | None) -> LowRank:
        depth = _START_DEPTH if previous is None else _STEP_DEPTH
        return krylov_low_rank(residual, rank, previous=previous, depth=depth, generator=generator)

    def last(residual: Tensor, previous: LowRank | None) -> LowRank:
        found = None if previous is None else rough(residual, frobenius(residual), previous, _END_HALF_DEPTH)
        if found is not None:
            return refine(residual, found)
        return krylov_low_rank(residual, rank, previous=previous, depth=_END_DEPTH, generator=generator)

    return LowRankSteps(step, last, rough)
