"""The refined method: better than LoftQ at the same bits, rank and container.

It adds fitted scales, a start from the SVD of W, and error feedback. The objective is LoftQ's, ‖W - Q - BA‖_F over
everything stored: codes, block scales, factors and, if the container can store them, the levels. Three things differ
from `numerics.methods.loftq`:

**Scales of least squared error.** LoftQ's step Q = q(W - BA) with absmax scales does not minimise ‖(W - BA) - Q‖, so
its residual can rise. `numerics.quantizers.block_scales` minimises it block by block: for fixed codes with levels c the
best scale is ⟨x, c⟩ / ⟨c, c⟩; for a fixed scale the nearest codes are best. Levels fitted to the matrix follow in the
same way: for fixed codes and scales s the best level is Σ s x / Σ s² over the elements that have it (Lloyd 1982, Max
1960).

**A start from the rank-r SVD of W**, so that strong directions never reach the quantizer.

**Error feedback.** Plain alternation stalls: BA fits the quantizer's noise, and the next Q reproduces W - BA with the
same noise. Quantizing W - BA + U instead, with U ← γ U + η E and E = W - Q - BA the last residual, pushes every element
with a persistent error over its threshold. This is damped dual ascent for the constraint W = Q + BA (U is ADMM's scaled
dual variable) and needs a Q-step that minimises its objective. U is tapered off, and the run ends with a plain step,
U = 0.

Convergence. A plain step (U = 0) fits Q to W - BA with the previous scales among the candidates, so ‖W - Q - BA‖ does
not rise (exactly for float32 values; if the loader rounds products, up to that rounding, as codes are the nearest
unrounded levels). Then BA = SVD_r(W - Q) is optimal for that Q (Eckart and Young), so the objective does not rise here
either: it decreases monotonically and is bounded by 0. Steps with feedback have no such guarantee. Therefore the best
iterate is kept (with its factors and residual made exact if they come from rough steps), the taper begins early if the
residual stalls, and if the residual diverges, feedback is dropped and plain steps continue from the best iterate.
Updating the levels between steps lowers the objective too, on the blocks that `fit_levels` samples.
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

_LEVELS_FROZEN = 2  # number of final steps in which levels are not updated
_DIVERGED = 1.5  # multiple of the best residual that counts as diverged
_CONVERGED = 1e-4  # relative change of the residual from one plain step to the next
_SETTLING = 6  # number of first steps exempt from that, as the residual rises at first
_CANCELLING = 1e-3  # remaining share of ‖W - Q‖² below which BA's rounding to bfloat16 would show in E


@dataclass(frozen=True)
class Feedback:
    """The schedule of error feedback.

    Attributes:
        kept, added: each step U loses 1 - `kept` of itself and gains `added` of the residual; more diverges.
        taper: the share of U in the last, the second last, ... step; before, it is 1.
        stalled: relative change of the residual that counts as none; the taper begins after two such steps in a row.
    """

    kept: float
    added: float
    taper: tuple[float, ...]
    stalled: float


# Measured on trained matrices (scripts/study).
USUAL_FEEDBACK = Feedback(0.7, 0.28, (0.0, 0.3, 0.6), 2e-3)
# A trellis has many codes for nearly the same values: it needs less, for longer, and ends where U fades out slowly.
TRELLIS_FEEDBACK = Feedback(0.7, 0.15, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 0.0)


@runtime_checkable
class LevelQuantizer(FittingQuantizer, Protocol):
    """A quantizer that can use levels fitted to the matrix."""

    def with_levels(self, levels: Tensor) -> LevelQuantizer:
        """Return the same quantizer with other levels, float32 [2**bits], ascending."""

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Return better levels for the codes and scales of `step`: float32 [2**bits], ascending."""


def refined(
    weight: Tensor,
    quantizer: FittingQuantizer,
    *,
    iters: int = DEFAULT_ITERS,
    low_rank: LowRankSteps | None,
    init: Init = "svd",
    feedback: bool = True,
    schedule: Feedback | None = None,
    levels: Tensor | None = None,
    keep_last: bool = False,
    column_weight: Tensor | None = None,
    objective: Callable[[Tensor], float] | None = None,
) -> LoftQResult:
    """Alternate fitted quantization of W - BA + U with the low-rank step; see the module's docstring.

    Args:
        weight: float32 [out, in].
        iters: T >= 1, the largest number of steps; there are fewer if the residual stops changing.
        low_rank: None for a matrix without an adapter: then only scales (and levels) are fitted.
        init: BA starts as the rank-r SVD of W, or at zero as in LoftQ.
        feedback: False makes plain steps only, which never raise the residual but stall earlier.
        schedule: of the feedback; None is the usual one.
        levels: float32 [2**bits], the start for levels fitted to the matrix; needs a `LevelQuantizer`.
        keep_last: keep the last iterate instead of the best one.
        column_weight: float32 [in], positive: weights of the columns' errors when scales (and levels) are fitted;
            `low_rank` must use them too. The reported residuals are unweighted.
        objective: a function of W - Q - BA whose least value determines the best iterate; by default its norm under
            `column_weight`.
    """
    assert iters >= 1, "T = 0 is plain quantization: use plain_start"
    norm = frobenius(weight)
    plain = quantizer.quantize_residual(weight, weight).residual_norm()
    if levels is not None:
        quantizer = cast(LevelQuantizer, quantizer).with_levels(levels)
    feeds = feedback and low_rank is not None
    run = _Run(weight, quantizer, low_rank, levels is not None, column_weight, iters, feeds)
    run.schedule = schedule or USUAL_FEEDBACK
    run.objective = objective
    if low_rank is not None and init == "svd":
        run.found = low_rank.rough(weight, norm, None) or low_rank.step(weight, None)
    run.set_first_target()
    while run.steps_left:
        run.step()
    kept = run.latest if keep_last else run.best
    assert kept is not None
    if kept.estimated:
        kept = run.make_exact(kept)
    a, b = _factors(kept.found, weight)
    residuals = tuple(value / norm if norm else 0.0 for value in run.residuals)
    return LoftQResult(kept.quantized, a, b, plain / norm if norm else 0.0, residuals, kept.number)


@dataclass(frozen=True)
class _Iterate:
    """Step `number` (from 1): Q, BA and the value of the objective."""

    number: int
    quantized: Quantized
    found: LowRank | None
    objective: float
    estimated: bool = False  # True if BA and the objective come from products in bfloat16


@dataclass
class _Run:
    """The state of a run on one matrix. Buffers of the matrix's size are reused from step to step."""

    weight: Tensor
    quantizer: FittingQuantizer
    low_rank: LowRankSteps | None
    fits_levels: bool
    column_weight: Tensor | None
    steps_left: int
    feeds: bool
    schedule: Feedback = USUAL_FEEDBACK
    objective: Callable[[Tensor], float] | None = None
    found: LowRank | None = None
    target: Tensor = field(init=False)
    fed: Tensor | None = None  # U
    half: Tensor | None = None  # memory for BA in bfloat16
    quantize_step: QuantizeStep | None = None
    stalled: int = 0  # the number of successive steps that changed almost nothing
    latest: _Iterate | None = None
    best: _Iterate | None = None
    residuals: list[float] = field(default_factory=list)

    def set_first_target(self) -> None:
        """Set the target to W - BA."""
        self.target = self.weight.clone() if self.found is None else self.weight - self.found.product()

    def step(self) -> None:
        """Make a Q-step, update the levels, make a low-rank step, and compute the next target."""
        self.steps_left -= 1
        done = self._quantize()
        if self.fits_levels and self.steps_left >= _LEVELS_FROZEN:
            levels = self._with_levels().fit_levels(self.target, done, column_weight=self.column_weight)
            self.quantizer = self._with_levels().with_levels(levels)
        self.found, self.quantize_step = self._factorise(done), done
        before, self.latest = self.latest, self._next_target(done)
        if self.best is None or self.latest.objective < self.best.objective:
            self.best = self.latest
        self._plan_ahead(before, self.latest, self.best)

    @property
    def _rough(self) -> bool:
        """True if this step serves only to compute the next target."""
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
        """Compute the next target, W - BA (+ U with feedback), and return this step's iterate."""
        iterate = _Iterate(len(self.residuals) + 1, done.quantized, self.found, 0.0)
        if self._rough and self.column_weight is None and self.objective is None:
            self.residuals.append(self._feed(done))
            halved = self.half is not None
            return replace(iterate, objective=self.residuals[-1], estimated=halved)
        error = self._next_error(done)
        self.residuals.append(frobenius(error))
        objective = self.residuals[-1]
        if self.objective is not None:
            objective = self.objective(error)
        elif self.column_weight is not None:
            objective = frobenius(error * self.column_weight.sqrt())
        if self._rough:
            self._feed_separately(error)
        return replace(iterate, objective=objective)

    def _feed(self, done: QuantizeStep) -> float:
        """Compute the next target and ‖E‖ in one pass, for runs whose objective is ‖E‖; return ‖E‖."""
        assert self.found is not None
        total = done.residual_norm() ** 2
        fused = isinstance(self.quantizer, FusedQuantizer)  # as `make_exact` requires
        if fused and half_is_faster(self.weight) and total - self.found.energy > _CANCELLING * total:
            self.half = torch.empty_like(self.weight, dtype=torch.bfloat16) if self.half is None else self.half
            product = self.found.product(torch.bfloat16, out=self.half)
        else:
            self.half = None
            product = self.found.product(out=self.target)
        self.fed = torch.zeros_like(self.weight) if self.fed is None else self.fed
        gains = FeedbackGains(self.schedule.kept, self.schedule.added, self._share())
        if isinstance(self.quantizer, FeedingQuantizer):
            norm = self.quantizer.feed_back(self.weight, product, done, self.fed, gains)
        else:
            norm = feed_back(self.weight, product, done.residual, self.fed, gains)
        self.target, self.quantize_step = done.residual, replace(done, residual=self.target)
        return norm

    def _next_error(self, done: QuantizeStep) -> Tensor:
        """Return E = W - Q - BA, in the residual's memory, and overwrite the target with the next one, W - BA."""
        if self.found is None:
            return done.residual
        torch.sub(self.weight, self.found.product(out=self.target), out=self.target)
        return done.residual.add_(self.target).sub_(self.weight)

    def _share(self) -> float:
        taper = self.schedule.taper
        return taper[self.steps_left - 1] if self.steps_left <= len(taper) else 1.0

    def _feed_separately(self, error: Tensor) -> None:
        """Update U with the last error and add it to the target."""
        kept, added = self.schedule.kept, self.schedule.added
        self.fed = error * added if self.fed is None else self.fed.mul_(kept).add_(error, alpha=added)
        self.target.add_(self.fed, alpha=self._share())

    def _plan_ahead(self, before: _Iterate | None, latest: _Iterate, best: _Iterate) -> None:
        """Decide from the latest step whether to continue, to end soon, or to drop feedback."""
        tolerance = self.schedule.stalled if self.feeds else _CONVERGED
        unchanged = before is not None and abs(before.objective - latest.objective) <= tolerance * latest.objective
        self.stalled = self.stalled + 1 if unchanged else 0
        if not self.feeds:
            self.steps_left = 0 if unchanged else self.steps_left
        elif not latest.objective <= _DIVERGED * best.objective:
            self._fall_back(best)
        elif self.stalled > 1 and latest.number >= _SETTLING:
            self.steps_left = min(self.steps_left, len(self.schedule.taper))

    def make_exact(self, kept: _Iterate) -> _Iterate:
        """Replace BA by the exact projection on its directions, and update the residual."""
        assert isinstance(self.quantizer, FusedQuantizer) and kept.found is not None
        residual = self.quantizer.restore(self.weight, kept.quantized)
        found = refine(residual, kept.found)
        self.residuals[kept.number - 1] = frobenius(residual.sub_(found.product()))
        return replace(kept, found=found, estimated=False)

    def _fall_back(self, best: _Iterate) -> None:
        """Continue with plain steps from the best iterate."""
        assert self.quantize_step is not None
        self.feeds, self.fed, self.found, self.latest = False, None, best.found, best
        self.quantize_step = QuantizeStep(best.quantized, self.quantize_step.residual)
        if isinstance(best.quantized, QuantizedBlocks) and best.quantized.levels is not None:
            self.quantizer = self._with_levels().with_levels(best.quantized.levels)
        self.set_first_target()

    def _with_levels(self) -> LevelQuantizer:
        return cast(LevelQuantizer, self.quantizer)


def _factors(found: LowRank | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    if found is None:
        return weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    return found.lora_a, found.lora_b
