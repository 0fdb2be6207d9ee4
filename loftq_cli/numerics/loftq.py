"""LoftQ: alternate a quantized backbone with the rank-r SVD of what it misses (arXiv 2310.08659, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loftq_cli.numerics import blocks
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.feedback import FeedbackGains, feed_back
from loftq_cli.numerics.fitted import fit_levels, fit_scales
from loftq_cli.numerics.grids import Quantized, dequantize
from loftq_cli.numerics.lowrank import (
    LowRank,
    exact_low_rank,
    frobenius,
    half_is_faster,
    half_low_rank,
    krylov_low_rank,
    refine,
)
from loftq_cli.numerics.start import zero_start

SHOWS = 0.25  # share of the energy captured from which bfloat16's noise in it could show in the residual's fifth digit
CANCELLING = 0.1  # share of the energy left below which float32 factors would cost the difference its fifth digit


@dataclass(frozen=True)
class QuantizeStep:
    """Codes and scales chosen for a target, and W - Q [out, in] for the weight: float32, or bfloat16 where asked for.

    `norm` is ‖W - Q‖_F before any rounding, where the quantizer took it on its way.
    """

    quantized: Quantized
    residual: Tensor
    norm: float | None = None

    def residual_norm(self) -> float:
        """‖W - Q‖_F."""
        return frobenius(self.residual) if self.norm is None else self.norm


class Quantizer(Protocol):
    """The container's fake quantization, as LoftQ needs it."""

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q and give W - Q. Both arguments float32 [out, in]."""


@runtime_checkable
class FusedQuantizer(Quantizer, Protocol):
    """A quantizer that makes its target W - BA by itself, block by block, so that it never goes through memory."""

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: QuantizeStep | None = None
    ) -> QuantizeStep:
        """Quantize W - BA to Q and give W - Q; no `found`, no BA. The residual of `scratch`, an earlier step, may be
        overwritten. `half`: BA is multiplied, and the residual rounded, in bfloat16. An error of 2⁻⁹ in the target's
        smaller part moves codes only where they were ties but for that; Q and ‖W - Q‖ stay exact."""

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """W - Q, float32 [out, in]."""


@runtime_checkable
class FittingQuantizer(Quantizer, Protocol):
    """A quantizer that can choose its scales (and zeros) for the least squared error on the container's own grid."""

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        """Quantize `target` to Q with fitted scales and give W - Q.

        Args:
            previous: an earlier step of this matrix, whose scales are the start. The squared error of `target` is never
                above what its scales give with the nearest codes. Its residual may be overwritten. None searches from
                scratch.
            column_weight: float32 [in], positive: the weight of the squared errors of a column; None weighs all alike.
        """


@runtime_checkable
class FeedingQuantizer(FittingQuantizer, Protocol):
    """One with cheaper passes for steps of error feedback, which promise nothing for a single step."""

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        """`quantize_fitted` with one fit of the scales, kept even where it is worse for a block."""

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        """`numerics.feedback.feed_back` with the residual of `step`, in one pass over memory."""


@dataclass(frozen=True)
class BlockQuantizer:
    """The plain-torch twin of the compiled quantizer, on any device. `levels` replace the codebook's, where it is a
    fitted one."""

    grid: BlockGrid
    levels: Tensor | None = None

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        quantized = blocks.quantize(target, self.grid)
        return QuantizeStep(quantized, self.restore(weight, quantized))

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: QuantizeStep | None = None
    ) -> QuantizeStep:
        product = None if found is None else found.product(torch.bfloat16 if half else torch.float32)
        step = self.quantize_residual(weight, weight if product is None else weight - product.float())
        return QuantizeStep(step.quantized, step.residual.bfloat16(), step.residual_norm()) if half else step

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        return weight - dequantize(quantized, self.grid)

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        return self._fitted(weight, target, previous, column_weight, guards=True)

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        return self._fitted(weight, target, previous, column_weight, guards=False)

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        return feed_back(weight, product, step.residual, fed, gains)

    def _fitted(
        self,
        weight: Tensor,
        target: Tensor,
        previous: QuantizeStep | None,
        column_weight: Tensor | None,
        *,
        guards: bool,
    ) -> QuantizeStep:
        levels = self.grid.levels(target.device) if self.levels is None else self.levels
        before = None if previous is None else blocks_of(previous).absmax
        scales = fit_scales(target, self.grid, levels, previous=before, column_weight=column_weight, guards=guards)
        codes = blocks.assign(target, scales, self.grid, levels)
        quantized = QuantizedBlocks(codes, scales, self.levels)
        return QuantizeStep(quantized, weight - blocks.dequantize(quantized, self.grid))

    def with_levels(self, levels: Tensor) -> BlockQuantizer:
        """The same with other levels, float32 [2**bits], ascending."""
        return BlockQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Better levels for the codes and scales of `step`."""
        return fit_levels(target, blocks_of(step), self.grid, column_weight)


def blocks_of(step: QuantizeStep) -> QuantizedBlocks:
    """What a codebook grid gave."""
    assert isinstance(step.quantized, QuantizedBlocks), "blocks belong to a codebook grid"
    return step.quantized


@dataclass(frozen=True)
class LoftQResult:
    """A backbone Q and an adapter BA for one weight matrix W [out, in].

    Attributes:
        quantized: codes and scales of Q.
        lora_a: float32 [r, in]; lora_b: float32 [out, r]. Scaling 1: W is approximated by Q + lora_b @ lora_a.
        plain_residual: ‖W - q(W)‖_F / ‖W‖_F, what quantization alone leaves.
        residuals: ‖W - Q_t - B_t A_t‖_F / ‖W‖_F after each step t = 1..T.
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
    kept: tuple[int, Quantized, LowRank] | None = None
    for t in range(1, iters + 1):
        step = steps.quantize(found, step)  # LoftQ eq. 7
        plain = plain or _relative(step.residual_norm(), norm)
        found = steps.factor(step, found)  # eq. 8-9
        residuals.append(_relative(steps.left_over(step, found), norm))
        if kept is None or keep_last or residuals[-1] < residuals[kept[0] - 1]:
            kept = (t, step.quantized, found)
    assert kept is not None and step is not None
    best, codes, found = kept
    if steps.is_estimate(step, found):
        step = None  # or its residual would stand in memory beside the exact one
        found, left = steps.settle(codes, found)
        residuals[best - 1] = _relative(left, norm)
    return LoftQResult(codes, found.lora_a, found.lora_b, plain, tuple(residuals), best)


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

    def is_estimate(self, step: QuantizeStep, found: LowRank) -> bool:
        """Whether `found` came from a rounded residual and holds so much that the rounding shows."""
        return step.residual.dtype == torch.bfloat16 and found.energy > SHOWS * step.residual_norm() ** 2

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
