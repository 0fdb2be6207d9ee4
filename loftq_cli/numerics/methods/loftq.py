"""LoftQ: alternate a quantized backbone with the rank-r SVD of its error (arXiv 2310.08659, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loftq_cli.numerics.grids.grid import Quantized, rows_of
from loftq_cli.numerics.grids.panels import panels
from loftq_cli.numerics.lowrank.truncate import (
    LowRank,
    exact_low_rank,
    frobenius,
    half_is_faster,
    half_low_rank,
    krylov_low_rank,
    refine_by,
)
from loftq_cli.numerics.methods.zero_start import zero_start
from loftq_cli.numerics.quantizers.protocols import FusedQuantizer, Quantizer, QuantizeStep, Scratch

ROUNDING_SHOWS = 0.25  # captured share of the energy above which bfloat16's noise could change the residual's 5th digit
DIVERGED = 1e3  # multiple of the residual of plain quantization above which the alternation only heads for overflow
CANCELLING = 0.1  # remaining share of the energy below which float32 factors would change the difference's 5th digit


@dataclass(frozen=True)
class LoftQResult:
    """A backbone Q and an adapter BA for one weight matrix W [out, in].

    Attributes:
        quantized: codes and scales of Q.
        lora_a: float32 [r, in]; lora_b: float32 [out, r]. Scaling 1: W is approximated by Q + lora_b @ lora_a.
        plain_residual: ‖W - q(W)‖_F / ‖W‖_F, the residual of quantization alone.
        residuals: ‖W - Q_t - B_t A_t‖_F / ‖W‖_F after each step t = 1..T, or up to the step that diverged.
        best: the step that was kept, counted from 1; 0 if there were no steps.
    """

    quantized: Quantized
    lora_a: Tensor
    lora_b: Tensor
    plain_residual: float
    residuals: tuple[float, ...]
    best: int

    @property
    def residual(self) -> float:
        """Relative residual of the step that was kept."""
        return self.residuals[self.best - 1] if self.best else self.plain_residual


LowRankStep = Callable[[Tensor, "LowRank | None"], LowRank]


@dataclass(frozen=True)
class FastStep:
    """The default `LowRankStep`: block Krylov, warm-started, within 0.1 % of the exact residual."""

    rank: int
    generator: torch.Generator

    def __call__(self, residual: Tensor, previous: LowRank | None) -> LowRank:
        return krylov_low_rank(residual, self.rank, previous=previous, generator=self.generator)

    def from_half(self, step: QuantizeStep, previous: LowRank | None) -> LowRank | None:
        """Return the approximation of a residual in bfloat16, or None if it must be computed from float32."""
        if step.residual.dtype != torch.bfloat16:
            return None
        return half_low_rank(
            step.residual, self.rank, previous=previous, generator=self.generator, norm=step.residual_norm()
        )


def loftq(
    weight: Tensor, quantizer: Quantizer, *, iters: int, low_rank: LowRankStep, keep_last: bool = False
) -> LoftQResult:
    """Alternate Q_t = q(W - B_{t-1} A_{t-1}) with B_t A_t = SVD_r(W - Q_t), from B_0 A_0 = 0 (Algorithm 1).

    LoftQ is not monotone (at 2 bits later steps are often worse), so the best iterate is kept, or the last one, as in
    the paper, if `keep_last`. It can even diverge, after a hundred steps or more; the iteration stops there, as no
    later step would be kept.

    Args:
        weight: float32 [out, in].
        iters: T >= 1 alternating steps.
    """
    assert iters >= 1, "T = 0 is plain quantization: use plain_start"
    norm = frobenius(weight)
    steps = _Steps(weight, quantizer, low_rank)
    found: LowRank | None = None
    plain = 0.0
    residuals: list[float] = []
    kept: _Kept | None = None
    scratch: Scratch | None = None
    for t in range(1, iters + 1):
        step = steps.quantize(found, scratch)  # LoftQ eq. 7
        plain = plain or _relative(step.residual_norm(), norm)
        found = steps.factor(step, found)  # eq. 8-9
        residuals.append(_relative(steps.remaining_norm(step, found), norm))
        unused: Tensor | None = step.quantized.codes
        if kept is None or keep_last or residuals[-1] < residuals[kept.number - 1]:
            unused = None if kept is None else kept.quantized.codes
            kept = _Kept(t, step.quantized, found, step.residual_norm(), is_estimate=_is_estimate(step, found))
        scratch = Scratch(step.residual, unused)
        if residuals[-1] > DIVERGED * plain and not keep_last:
            break
    assert kept is not None
    found = kept.found
    if kept.is_estimate:
        found, left = steps.make_exact(kept)
        residuals[kept.number - 1] = _relative(left, norm)
    return LoftQResult(kept.quantized, found.lora_a, found.lora_b, plain, tuple(residuals), kept.number)


@dataclass(frozen=True)
class _Kept:
    """The best step so far: its number from 1, Q, BA, ‖W - Q‖_F, and whether BA must still be made exact."""

    number: int
    quantized: Quantized
    found: LowRank
    total: float
    is_estimate: bool


def _is_estimate(step: QuantizeStep, found: LowRank) -> bool:
    """True if `found` comes from a rounded residual and captures so much of it that the rounding shows."""
    return step.residual.dtype == torch.bfloat16 and found.energy > ROUNDING_SHOWS * step.residual_norm() ** 2


def _remaining_norm(total: float, found: LowRank) -> float | None:
    """Return ‖R - BA‖_F for a residual of norm `total`, by Pythagoras, or None if the difference would cancel."""
    left = total**2 - found.energy
    return math.sqrt(left) if left > CANCELLING * total**2 else None


@dataclass(frozen=True)
class _Steps:
    """The two half-steps, in bfloat16 if that is faster on this machine and the spectrum allows it."""

    weight: Tensor
    quantizer: Quantizer
    low_rank: LowRankStep

    def quantize(self, found: LowRank | None, scratch: Scratch | None) -> QuantizeStep:
        """Compute Q of W - BA; this may overwrite `scratch`."""
        if isinstance(self.quantizer, FusedQuantizer):
            half = isinstance(self.low_rank, FastStep) and half_is_faster(self.weight)
            return self.quantizer.quantize_corrected(self.weight, found, half=half, scratch=scratch)
        target = self.weight if found is None else self.weight - found.product()
        return self.quantizer.quantize_residual(self.weight, target)

    def factor(self, step: QuantizeStep, previous: LowRank | None) -> LowRank:
        """Compute BA of W - Q."""
        if isinstance(self.low_rank, FastStep):
            found = self.low_rank.from_half(step, previous)
            if found is not None:
                return found
        return self.low_rank(self._full(step), previous)

    def remaining_norm(self, step: QuantizeStep, found: LowRank) -> float:
        """Return ‖W - Q - BA‖_F, by Pythagoras from known norms, or directly if the difference would cancel."""
        left = _remaining_norm(step.residual_norm(), found)
        return frobenius(self._full(step) - found.product()) if left is None else left

    def make_exact(self, kept: _Kept) -> tuple[LowRank, float]:
        """Return the exact projection of W - Q on the directions found, and ‖W - Q - BA‖_F."""
        assert isinstance(self.quantizer, FusedQuantizer)
        found = refine_by(partial(self._images, kept.quantized), kept.found)
        left = _remaining_norm(kept.total, found)
        if left is None:
            left = frobenius(self.quantizer.restore(self.weight, kept.quantized) - found.product())
        return found, left

    def _images(self, quantized: Quantized, basis: Tensor) -> Tensor:
        """Return (W - Q) @ basis, computed in panels of rows: all of W - Q would take as much memory as W."""
        assert isinstance(self.quantizer, FusedQuantizer)
        images = basis.new_empty(self.weight.shape[0], basis.shape[1])
        for rows in panels(self.weight):
            part = rows_of(quantized, self.quantizer.grid, rows)
            if part is None:
                return self.quantizer.restore(self.weight, quantized) @ basis
            torch.mm(self.quantizer.restore(self.weight[rows], part), basis, out=images[rows])
        return images

    def _full(self, step: QuantizeStep) -> Tensor:
        if step.residual.dtype == torch.float32:
            return step.residual
        assert isinstance(self.quantizer, FusedQuantizer)
        return self.quantizer.restore(self.weight, step.quantized)


def plain_start(
    weight: Tensor, quantizer: Quantizer, *, rank: int, generator: torch.Generator, group: int = 1
) -> LoftQResult:
    """Return QLoRA's start (arXiv 2305.14314): plain quantization with PEFT's default, A Kaiming-uniform and B zero.

    Args:
        group: the number of inputs that the adapter pools.
    """
    step = quantizer.quantize_residual(weight, weight)
    start = zero_start(weight.shape[0], weight.shape[1], rank, generator=generator, group=group)
    plain = _relative(frobenius(step.residual), frobenius(weight))
    return LoftQResult(step.quantized, start.lora_a.to(weight.device), start.lora_b.to(weight.device), plain, (), 0)


def exact_step(rank: int) -> LowRankStep:
    """Return the paper's own step, a full SVD."""
    return lambda residual, _previous: exact_low_rank(residual, rank)


def fast_step(rank: int, generator: torch.Generator) -> FastStep:
    """Return the default step."""
    return FastStep(rank, generator)


def _relative(residual: float, norm: float) -> float:
    return residual / norm if norm else 0.0
