"""The methods that fit scales, called for one matrix as a recipe says."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from loftq_cli.kernels import column_quantizer
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.numerics.lowrank.truncate import frobenius
from loftq_cli.numerics.methods.ldlq import ldlq
from loftq_cli.numerics.methods.ldlq_metric import metric
from loftq_cli.numerics.methods.loftq import LoftQResult, LowRankStep, exact_step, fast_step
from loftq_cli.numerics.methods.refined import TRELLIS_FEEDBACK, USUAL_FEEDBACK, Init, refined
from loftq_cli.numerics.methods.refined_steps import LowRankSteps, shallow_steps
from loftq_cli.numerics.methods.weighted import WeightedResult, WeightedStep, Whitening, weighted_result
from loftq_cli.numerics.quantizers.protocols import FittingQuantizer, Quantizer
from loftq_cli.recipe.model import Recipe


def fit_refined(
    weight: Tensor,
    quantizer: Quantizer,
    rank: int,
    grid: Grid,
    recipe: Recipe,
    generator: torch.Generator,
    whitening: Whitening | None,
) -> tuple[LoftQResult, WeightedResult | None]:
    """Run the refined method; without an adapter it only fits the scales (and levels)."""
    assert isinstance(quantizer, FittingQuantizer), "the quantizer of every container can fit its scales"
    exact = LowRankSteps(exact_step(rank), exact_step(rank))
    steps = exact if recipe.svd == "exact" else shallow_steps(rank, generator)
    if whitening is not None:
        steps = LowRankSteps(WeightedStep(whitening, steps.step), WeightedStep(whitening, steps.last))
    found = refined(
        weight,
        quantizer,
        iters=recipe.iters,
        low_rank=steps if rank else None,
        init=cast(Init, recipe.init),
        levels=grid.levels(weight.device) if isinstance(grid, BlockGrid) and grid.codebook.fitted else None,
        keep_last=recipe.keep_last,
        schedule=TRELLIS_FEEDBACK if isinstance(grid, TrellisGrid) else USUAL_FEEDBACK,
        # Integer groups are fitted without column weights; the adapter and the choice of the step are weighted.
        column_weight=None if whitening is None or isinstance(grid, AffineGrid) else whitening.variances,
        objective=None if whitening is None else lambda error: frobenius(whitening.apply(error)),
    )
    return found, None if whitening is None else weighted_result(weight, found, grid, quantizer, whitening)


def fit_ldlq(
    weight: Tensor,
    quantizer: Quantizer,
    rank: int,
    grid: Grid,
    recipe: Recipe,
    generator: torch.Generator,
    moment: Tensor | None,
) -> WeightedResult:
    """Run LDLQ. Without a moment, of a layer whose inputs are not seen, all inputs count the same."""
    step: LowRankStep = exact_step(rank) if recipe.svd == "exact" else fast_step(rank, generator)
    return ldlq(
        weight,
        quantizer,
        column_quantizer(grid, weight.device),
        metric(torch.ones(weight.shape[1]) if moment is None else moment, weight.device),
        rounds=recipe.iters,
        low_rank=step if rank else None,
        from_zero=recipe.init == "zero",
        keep_last=recipe.keep_last,
    )
