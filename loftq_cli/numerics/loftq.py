"""LoftQ: alternate a quantized backbone with the rank-r SVD of what it misses (arXiv 2310.08659, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids import Quantized
from loftq_cli.numerics.lowrank import (
    LowRank,
    exact_low_rank,
    frobenius,
    half_is_faster,
    half_low_rank,
    krylov_low_rank,
    refine,
)
from loftq_cli.numerics.quantizers import FusedQuantizer, Quantizer, QuantizeStep
from loftq_cli.numerics.start import zero_start

SHOWS = 0.25  # share of the energy captured from which bfloat16's noise in it could show in the residual's fifth digit
DIVERGED = 1e3  # times what plain quantization leaves: from there the alternation has only overflow before it
CANCELLING = 0.1  # share of the energy left below which float32 factors would cost the difference its fifth digit


@dataclass(frozen=True)
class LoftQResult:
    """A backbone Q and an adapter BA for one weight matrix W [out, in].

    Attributes:
        quantized: codes and scales of Q.
        lora_a: float32 [r, in]; lora_b: float32 [out, r]. Scaling 1: W is approximated by Q + lora_b @ lora_a.
        plain_residual: ‖W - q(W)‖_F / ‖W‖_F, what quantization alone leaves.
        residuals: ‖W - Q_t - B_t A_t‖_F / ‖W‖_F after each step t = 1..T, or up to the one that diverged.
        best: the step that was kept, counted from 1; 0 where no step was made.
    """

    quantized: Quantized
    lora_a: Tensor
    lora_b: Tensor
    plain_residual: float
    residuals: tuple[float, ...]
    best: int

    @property
    def residual(self) -> float:
        """Relative residual of what was kept."""
        return self.residuals[self.best - 1] if self.best else self.plain_residual


LowRankStep = Callable[[Tensor, "LowRank | None"], LowRank]


@dataclass(frozen=True)
class FastStep:
    """The default low-rank step: block Krylov, warm-started, within 0.1 % of the exact residual. A `LowRankStep`."""

    rank: int
    generator: torch.Generator

    def __call__(self, residual: Tensor, previous: LowRank | None) -> LowRank:
        return krylov_low_rank(residual, self.rank, previous=previous, generator=self.generator)

    def of_half(self, step: QuantizeStep, previous: LowRank | None) -> LowRank | None:
        """The same for a residual in bfloat16; None where it has to be known in float32."""
        if step.residual.dtype != torch.bfloat16:
            return None
        return half_low_rank(
            step.residual, self.rank, previous=previous, generator=self.generator, norm=step.residual_norm()
        )


def loftq(
    weight: Tensor, quantizer: Quantizer, *, iters: int, low_rank: LowRankStep, keep_last: bool = False
) -> LoftQResult:
    """Alternate Q_t = q(W - B_{t-1} A_{t-1}) with B_t A_t = SVD_r(W - Q_t), from B_0 A_0 = 0 (Algorithm 1).

    LoftQ is not monotone (at 2 bits later steps are often worse), so the best iterate is kept unless `keep_last` asks
    for the paper's literal last one.

    Args:
        weight: float32 [out, in].
        iters: T >= 1 alternating steps.
    """
    assert iters >= 1, "T = 0 is plain quantization: plain_start"
    norm = frobenius(weight)
    steps = _Steps(weight, quantizer, low_rank)
    step: QuantizeStep | None = None
    found: LowRank | None = None
    plain = 0.0
    residuals: list[float] = []
    kept: _Kept | None = None
    for t in range(1, iters + 1):
        step = steps.quantize(found, step)  # LoftQ eq. 7
        plain = plain or _relative(step.residual_norm(), norm)
        found = steps.factor(step, found)  # eq. 8-9
        residuals.append(_relative(steps.left_over(step, found), norm))
        if kept is None or keep_last or residuals[-1] < residuals[kept.number - 1]:
            kept = _Kept(t, step.quantized, found, is_estimate=_is_estimate(step, found))
        if residuals[-1] > DIVERGED * plain and not keep_last:
            break
    assert kept is not None
    found = kept.found
    if kept.is_estimate:
        step = None  # or its residual would stand in memory beside the exact one
        found, left = steps.settle(kept.quantized, found)
        residuals[kept.number - 1] = _relative(left, norm)
    return LoftQResult(kept.quantized, found.lora_a, found.lora_b, plain, tuple(residuals), kept.number)


@dataclass(frozen=True)
class _Kept:
    """The step kept so far: its number from 1, Q and BA, and whether BA is to be settled."""

    number: int
    quantized: Quantized
    found: LowRank
    is_estimate: bool


def _is_estimate(step: QuantizeStep, found: LowRank) -> bool:
    """Whether `found` came from a rounded residual and holds so much that the rounding shows."""
    return step.residual.dtype == torch.bfloat16 and found.energy > SHOWS * step.residual_norm() ** 2


@dataclass(frozen=True)
class _Steps:
    """The two half-steps, in bfloat16 where the machine is faster at it and the spectrum allows."""

    weight: Tensor
    quantizer: Quantizer
    low_rank: LowRankStep

    def quantize(self, found: LowRank | None, used: QuantizeStep | None) -> QuantizeStep:
        """Q of W - BA; `used`, the step before, is used up."""
        if isinstance(self.quantizer, FusedQuantizer):
            half = isinstance(self.low_rank, FastStep) and half_is_faster(self.weight)
            return self.quantizer.quantize_corrected(self.weight, found, half=half, scratch=used)
        target = self.weight if found is None else self.weight - found.product()
        return self.quantizer.quantize_residual(self.weight, target)

    def factor(self, step: QuantizeStep, previous: LowRank | None) -> LowRank:
        """BA of W - Q."""
        if isinstance(self.low_rank, FastStep):
            found = self.low_rank.of_half(step, previous)
            if found is not None:
                return found
        return self.low_rank(self._full(step), previous)

    def left_over(self, step: QuantizeStep, found: LowRank) -> float:
        """‖W - Q - BA‖_F: by Pythagoras from the norms at hand, or directly where the difference would cancel."""
        total = step.residual_norm() ** 2
        if total - found.energy > CANCELLING * total:
            return math.sqrt(total - found.energy)
        return frobenius(self._full(step) - found.product())

    def settle(self, quantized: Quantized, found: LowRank) -> tuple[LowRank, float]:
        """The exact projection of W - Q on the directions of `found`, and what it leaves."""
        assert isinstance(self.quantizer, FusedQuantizer)
        residual = self.quantizer.restore(self.weight, quantized)
        step, found = QuantizeStep(quantized, residual), refine(residual, found)
        return found, self.left_over(step, found)

    def _full(self, step: QuantizeStep) -> Tensor:
        if step.residual.dtype == torch.float32:
            return step.residual
        assert isinstance(self.quantizer, FusedQuantizer)
        return self.quantizer.restore(self.weight, step.quantized)


def plain_start(
    weight: Tensor, quantizer: Quantizer, *, rank: int, generator: torch.Generator, group: int = 1
) -> LoftQResult:
    """QLoRA: plain quantization and PEFT's default start, A Kaiming-uniform and B zero (arXiv 2305.14314); over inputs
    pooled in groups of `group`."""
    step = quantizer.quantize_residual(weight, weight)
    start = zero_start(weight.shape[0], weight.shape[1], rank, generator=generator, group=group)
    plain = _relative(frobenius(step.residual), frobenius(weight))
    return LoftQResult(step.quantized, start.lora_a.to(weight.device), start.lora_b.to(weight.device), plain, (), 0)


def exact_step(rank: int) -> LowRankStep:
    """The paper's own step: a full SVD."""
    return lambda residual, _previous: exact_low_rank(residual, rank)


def fast_step(rank: int, generator: torch.Generator) -> FastStep:
    """The default step."""
    return FastStep(rank, generator)


def _relative(residual: float, norm: float) -> float:
    return residual / norm if norm else 0.0
