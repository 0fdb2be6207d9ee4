"""Past LoftQ at the same bits, rank and container: fitted scales, a start from the SVD of W, error feedback.

The objective is LoftQ's, ‖W - Q - BA‖_F over everything stored: codes, block scales, factors and, where the container
has room, the levels. Three things differ from `numerics.loftq`:

**Scales of least squared error.** LoftQ's step Q = q(W - BA) with absmax scales does not minimise ‖(W - BA) - Q‖, which
is why its residual can rise. `numerics.fitted` does, block by block: for fixed codes with levels c the best scale is
⟨x, c⟩ / ⟨c, c⟩, for a fixed scale the nearest codes are best. Levels of the matrix's own follow the same way: for fixed
codes and scales s the best level is Σ s x / Σ s² over the elements that have it (Lloyd 1982, Max 1960).

**A start from the rank-r SVD of W**, so that strong directions never reach the quantizer.

**Error feedback.** Plain alternation stalls: BA fits the quantizer's noise, and the next Q reproduces W - BA with the
same noise. Quantizing W - BA + U instead, U ← γ U + η E with E = W - Q - BA the last residual, pushes every element
whose error persists over its threshold: damped dual ascent for the constraint W = Q + BA (ADMM's scaled dual variable),
which needs a Q-step that really minimises. U's share is tapered off and the run ends on a plain step, U = 0.

Convergence. A plain step (U = 0) fits Q to W - BA with the previous scales among the candidates, so ‖W - Q - BA‖ does
not rise (exactly for float32 values; where the loader rounds products, up to that rounding, since codes are the nearest
unrounded levels); then BA = SVD_r(W - Q) is optimal for that Q (Eckart and Young), so it does not rise either: the
objective decreases monotonically and is bounded by 0. Steps with feedback have no such guarantee. Therefore the best
iterate is kept (its factors and residual made exact where rough steps found them), the taper begins early where the
residual stalls, and where it runs away feedback is dropped and plain steps go on from the best one. Updating
the levels between steps lowers it too, on the blocks that are looked at (`numerics.fitted.fit_levels` samples).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from loftq_cli.numerics.grids.blocks import QuantizedBlocks
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank, frobenius, half_is_faster, refine
from loftq_cli.numerics.methods.loftq import LoftQResult
from loftq_cli.numerics.methods.refined_steps import LowRankSteps
from loftq_cli.numerics.quantizers.feedback import FeedbackGains, feed_back
from loftq_cli.numerics.quantizers.protocols import FeedingQuantizer, FittingQuantizer, FusedQuantizer, QuantizeStep

Init = Literal["svd", "zero"]
DEFAULT_ITERS = 16

# Measured on trained matrices (scripts/study): U forgets 30 % a step and takes 28 % of the residual; more diverges.
_KEPT, _ADDED = 0.7, 0.28
_TAPER = (0.0, 0.3, 0.6)  # U's share in the last, the last but one and the third last step
_LEVELS_FROZEN = 2  # steps at the end in which levels stay
_DIVERGED = 1.5  # times the best residual
_CONVERGED = 1e-4  # relative change of the residual from one plain step to the next
_STALLED = 2e-3  # the same with feedback; twice in a row, and the taper begins
_SETTLING = 6  # steps before that, in which the residual first rises
_CANCELLING = 1e-3  # share of ‖W - Q‖² left below which BA's rounding to bfloat16 would show in E


@runtime_checkable
class LevelQuantizer(FittingQuantizer, Protocol):
    """A quantizer whose levels may be the matrix's own."""

    def with_levels(self, levels: Tensor) -> LevelQuantizer:
        """The same with other levels, float32 [2**bits], ascending."""

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Better levels for the codes and scales of `step`: float32 [2**bits], ascending."""


def refined(
    weight: Tensor,
    quantizer: FittingQuantizer,
    *,
    iters: int = DEFAULT_ITERS,
    low_rank: LowRankSteps | None,
    init: Init = "svd",
    feedback: bool = True,
    levels: Tensor | None = None,
    keep_last: bool = False,
    column_weight: Tensor | None = None,
    objective: Callable[[Tensor], float] | None = None,
) -> LoftQResult:
    """Alternate fitted quantization of W - BA + U with the low-rank step; see the module's docstring.

    Args:
        weight: float32 [out, in].
        iters: T >= 1 steps at most; fewer where the residual stands still.
        low_rank: None for a matrix without an adapter, whose scales (and levels) are all there is to fit.
        init: BA starts as the rank-r SVD of W, or at zero as LoftQ's.
        feedback: False makes plain steps only, which never raise the residual and stall earlier.
        levels: float32 [2**bits] to start from where the matrix gets levels of its own; needs a `LevelQuantizer`.
        keep_last: keep the last iterate instead of the best one.
        column_weight: float32 [in], positive: fit the scales (and levels) to the error with columns weighted so;
            `low_rank` must do so too. The residuals reported stay unweighted.
        objective: of W - Q - BA, which iterate is best; by default its norm under `column_weight`.
    """
    assert iters >= 1, "T = 0 is plain quantization: plain_start"
    norm = frobenius(weight)
    plain = quantizer.quantize_residual(weight, weight).residual_norm()
    if levels is not None:
        quantizer = cast(LevelQuantizer, quantizer).with_levels(levels)
    run = _Run(weight, quantizer, low_rank, levels is not None, column_weight, iters, feedback and low_rank is not None)
    run.objective = objective
    if low_rank is not None and init == "svd":
        run.found = low_rank.rough(weight, norm, None) or low_rank.step(weight, None)
    run.aim()
    while run.steps_left:
        run.step()
    kept = run.tried if keep_last else run.best
    assert kept is not None
    if kept.estimated:
        kept = run.settle(kept)
    a, b = _factors(kept.found, weight)
    residuals = tuple(value / norm if norm else 0.0 for value in run.residuals)
    return LoftQResult(kept.quantized, a, b, plain / norm if norm else 0.0, residuals, kept.number)


@dataclass(frozen=True)
class _Iterate:
    """Step `number` (from 1): Q, BA and what is minimised."""

    number: int
    quantized: Quantized
    found: LowRank | None
    objective: float
    estimated: bool = False  # BA and the objective, from products in bfloat16


@dataclass
class _Run:
    """One matrix's course: what changes from step to step. Memory of the matrix's size is used again."""

    weight: Tensor
    quantizer: FittingQuantizer
    low_rank: LowRankSteps | None
    fits_levels: bool
    column_weight: Tensor | None
    steps_left: int
    feeds: bool
    objective: Callable[[Tensor], float] | None = None
    found: LowRank | None = None
    target: Tensor = field(init=False)
    fed: Tensor | None = None  # U
    half: Tensor | None = None  # memory for BA in bfloat16
    quantize_step: QuantizeStep | None = None
    still: int = 0  # steps in a row that changed next to nothing
    tried: _Iterate | None = None
    best: _Iterate | None = None
    residuals: list[float] = field(default_factory=list)

    def aim(self) -> None:
        """The first target: W - BA."""
        self.target = self.weight.clone() if self.found is None else self.weight - self.found.product()

    def step(self) -> None:
        """Q-step, levels, low-rank step; then the target of the next one."""
        self.steps_left -= 1
        done = self._quantize()
        if self.fits_levels and self.steps_left >= _LEVELS_FROZEN:
            levels = self._with_levels().fit_levels(self.target, done, column_weight=self.column_weight)
            self.quantizer = self._with_levels().with_levels(levels)
        self.found, self.quantize_step = self._factorise(done), done
        before, self.tried = self.tried, self._next_target(done)
        if self.best is None or self.tried.objective < self.best.objective:
            self.best = self.tried
        self._plan_ahead(before, self.tried, self.best)

    @property
    def _rough(self) -> bool:
        """Whether this step's only use is the next one's target."""
        return self.feeds and self.steps_left > 0

    def _quantize(self) -> QuantizeStep:
        weights = {} if self.column_weight is None else {"column_weight": self.column_weight}
        if self._rough and isinstance(self.quantizer, FeedingQuantizer):
            return self.quantizer.quantize_roughly(self.weight, self.target, previous=self.quantize_step, **weights)
        return self.quantizer.quantize_fitted(self.weight, self.target, previous=self.quantize_step, **weights)

    def _factorise(self, done: QuantizeStep) -> LowRank | None:
        if self.low_rank is None:
            return None
        if not self.steps_left:
            return self.low_rank.last(done.residual, self.found)
        found = self.low_rank.rough(done.residual, done.residual_norm(), self.found) if self.feeds else None
        return found or self.low_rank.step(done.residual, self.found)

    def _next_target(self, done: QuantizeStep) -> _Iterate:
        """How far this step got, and the target of the next one: W - BA, with feedback + U."""
        tried = _Iterate(len(self.residuals) + 1, done.quantized, self.found, 0.0)
        if self._rough and self.column_weight is None and self.objective is None:
            self.residuals.append(self._feed(done))
            halved = self.half is not None
            return replace(tried, objective=self.residuals[-1], estimated=halved)
        error = self._next_error(done)
        self.residuals.append(frobenius(error))
        objective = self.residuals[-1]
        if self.objective is not None:
            objective = self.objective(error)
        elif self.column_weight is not None:
            objective = frobenius(error * self.column_weight.sqrt())
        if self._rough:
            self._feed_apart(error)
        return replace(tried, objective=objective)

    def _feed(self, done: QuantizeStep) -> float:
        """The same in one pass, where ‖E‖ is the objective; gives that."""
        assert self.found is not None
        total = done.residual_norm() ** 2
        exactly = isinstance(self.quantizer, FusedQuantizer)  # which `settle` needs
        if exactly and half_is_faster(self.weight) and total - self.found.energy > _CANCELLING * total:
            self.half = torch.empty_like(self.weight, dtype=torch.bfloat16) if self.half is None else self.half
            product = self.found.product(torch.bfloat16, out=self.half)
        else:
            self.half = None
            product = self.found.product(out=self.target)
        self.fed = torch.zeros_like(self.weight) if self.fed is None else self.fed
        gains = FeedbackGains(_KEPT, _ADDED, self._share())
        if isinstance(self.quantizer, FeedingQuantizer):
            norm = self.quantizer.feed_back(self.weight, product, done, self.fed, gains)
        else:
            norm = feed_back(self.weight, product, done.residual, self.fed, gains)
        self.target, self.quantize_step = done.residual, replace(done, residual=self.target)
        return norm

    def _next_error(self, done: QuantizeStep) -> Tensor:
        """E = W - Q - BA in the residual's memory, and W - BA as the next target in the last one's."""
        if self.found is None:
            return done.residual
        torch.sub(self.weight, self.found.product(out=self.target), out=self.target)
        return done.residual.add_(self.target).sub_(self.weight)

    def _share(self) -> float:
        return _TAPER[self.steps_left - 1] if self.steps_left <= len(_TAPER) else 1.0

    def _feed_apart(self, error: Tensor) -> None:
        """Add U, moved on by the last error, to the target."""
        self.fed = error * _ADDED if self.fed is None else self.fed.mul_(_KEPT).add_(error, alpha=_ADDED)
        self.target.add_(self.fed, alpha=self._share())

    def _plan_ahead(self, before: _Iterate | None, tried: _Iterate, best: _Iterate) -> None:
        """By how the step went: go on, end soon, or drop feedback."""
        tolerance = _STALLED if self.feeds else _CONVERGED
        still = before is not None and abs(before.objective - tried.objective) <= tolerance * tried.objective
        self.still = self.still + 1 if still else 0
        if not self.feeds:
            self.steps_left = 0 if still else self.steps_left
        elif not tried.objective <= _DIVERGED * best.objective:
            self._fall_back(best)
        elif self.still > 1 and tried.number >= _SETTLING:
            self.steps_left = min(self.steps_left, len(_TAPER))

    def settle(self, kept: _Iterate) -> _Iterate:
        """The exact projection on the directions found, and what it leaves."""
        assert isinstance(self.quantizer, FusedQuantizer) and kept.found is not None
        residual = self.quantizer.restore(self.weight, kept.quantized)
        found = refine(residual, kept.found)
        self.residuals[kept.number - 1] = frobenius(residual.sub_(found.product()))
        return replace(kept, found=found, estimated=False)

    def _fall_back(self, best: _Iterate) -> None:
        """Plain steps from the best iterate on."""
        assert self.quantize_step is not None
        self.feeds, self.fed, self.found, self.tried = False, None, best.found, best
        self.quantize_step = QuantizeStep(best.quantized, self.quantize_step.residual)
        if isinstance(best.quantized, QuantizedBlocks) and best.quantized.levels is not None:
            self.quantizer = self._with_levels().with_levels(best.quantized.levels)
        self.aim()

    def _with_levels(self) -> LevelQuantizer:
        return cast(LevelQuantizer, self.quantizer)


def _factors(found: LowRank | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    if found is None:
        return weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    return found.lora_a, found.lora_b
