"""LoftQ: alternate a quantized backbone with the rank-r SVD of what it misses (arXiv 2310.08659, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loftq_cli.numerics import blocks
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.fitted import fit_levels, fit_scales
from loftq_cli.numerics.lowrank import LowRank, exact_low_rank, frobenius, krylov_low_rank

_CANCELLING = 0.1  # share of the energy left below which float32 factors would cost the difference its fifth digit


@dataclass(frozen=True)
class QuantizeStep:
    """Codes and scales chosen for a target, and W - Q float32 [out, in] for the weight.

    `norm` is ‖W - Q‖_F and `half` is W - Q in bfloat16, where the quantizer made them on its way.
    """

    quantized: QuantizedBlocks
    residual: Tensor
    norm: float | None = None
    half: Tensor | None = None

    def residual_norm(self) -> float:
        """‖W - Q‖_F."""
        return frobenius(self.residual) if self.norm is None else self.norm


class Quantizer(Protocol):
    """The container's fake quantization, as LoftQ needs it."""

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q and give W - Q. Both arguments float32 [out, in]."""


@runtime_checkable
class FusedQuantizer(Quantizer, Protocol):
    """A quantizer that makes its target W - BA by itself, panel by panel, so that it never goes through memory."""

    def quantize_corrected(
        self, weight: Tensor, lora_b: Tensor, lora_a: Tensor, *, scratch: QuantizeStep | None = None
    ) -> QuantizeStep:
        """Quantize W - BA to Q and give W - Q. The residual of `scratch`, an earlier step, is overwritten."""


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


@dataclass(frozen=True)
class BlockQuantizer:
    """The plain-torch twin of the compiled quantizer, on any device. `levels` replace the codebook's, where it is a
    fitted one."""

    grid: BlockGrid
    levels: Tensor | None = None

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        quantized = blocks.quantize(target, self.grid)
        return QuantizeStep(quantized, weight - blocks.dequantize(quantized, self.grid))

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        levels = self.grid.levels(target.device) if self.levels is None else self.levels
        before = None if previous is None else previous.quantized.absmax
        scales = fit_scales(target, self.grid, levels, previous=before, column_weight=column_weight)
        codes = blocks.assign(target, scales, self.grid, levels)
        quantized = QuantizedBlocks(codes, scales, self.levels)
        return QuantizeStep(quantized, weight - blocks.dequantize(quantized, self.grid))

    def with_levels(self, levels: Tensor) -> BlockQuantizer:
        """The same with other levels, float32 [2**bits], ascending."""
        return BlockQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Better levels for the codes and scales of `step`."""
        return fit_levels(target, step.quantized, self.grid, column_weight)


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

    quantized: QuantizedBlocks
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
    """The default low-rank step: block Krylov, warm-started, within 0.1 % of the exact residual. A `LowRankStep`.

    The depths are those of the Krylov space without and with a previous step; None takes the defaults.
    """

    rank: int
    generator: torch.Generator
    first_depth: int | None = None
    later_depth: int | None = None

    def __call__(self, residual: Tensor, previous: LowRank | None) -> LowRank:
        return self._krylov(residual, previous)

    def of(self, step: QuantizeStep, previous: LowRank | None) -> LowRank:
        """The same, with what the quantizer knows about the residual."""
        return self._krylov(step.residual, previous, half=step.half, norm=step.norm)

    def _krylov(self, residual: Tensor, previous: LowRank | None, **known: Any) -> LowRank:
        depth = self.first_depth if previous is None else self.later_depth
        return krylov_low_rank(residual, self.rank, previous=previous, depth=depth, generator=self.generator, **known)


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
    step = quantizer.quantize_residual(weight, weight)  # LoftQ eq. 7
    plain = _relative(step.residual_norm(), norm)
    found: LowRank | None = None
    residuals: list[float] = []
    kept: tuple[int, QuantizedBlocks, LowRank] | None = None
    for t in range(1, iters + 1):
        if found is not None:
            step = _requantize(quantizer, weight, found, step)
        # eq. 8-9
        found = low_rank.of(step, found) if isinstance(low_rank, FastStep) else low_rank(step.residual, found)
        residuals.append(_relative(_left_over(step, found), norm))
        if kept is None or keep_last or residuals[-1] < residuals[kept[0] - 1]:
            kept = (t, step.quantized, found)
    assert kept is not None
    best, codes, found = kept
    return LoftQResult(codes, found.lora_a, found.lora_b, plain, tuple(residuals), best)


def _requantize(quantizer: Quantizer, weight: Tensor, found: LowRank, step: QuantizeStep) -> QuantizeStep:
    """The next Q, of W - BA; `step` is used up."""
    b, a = found.lora_b, found.lora_a
    if isinstance(quantizer, FusedQuantizer):
        return quantizer.quantize_corrected(weight, b, a, scratch=step)
    return quantizer.quantize_residual(weight, torch.addmm(weight, b, a, alpha=-1))


def _left_over(step: QuantizeStep, found: LowRank) -> float:
    """‖W - Q - BA‖_F: by Pythagoras from the norms at hand, or directly where the difference would cancel."""
    total, captured = step.residual_norm() ** 2, float(found.s.double().square().sum())
    if total - captured > _CANCELLING * total:
        return math.sqrt(total - captured)
    return frobenius(torch.addmm(step.residual, found.lora_b, found.lora_a, alpha=-1))


def plain_start(weight: Tensor, quantizer: Quantizer, *, rank: int, generator: torch.Generator) -> LoftQResult:
    """QLoRA: plain quantization and PEFT's default start, A Kaiming-uniform and B zero (arXiv 2305.14314)."""
    step = quantizer.quantize_residual(weight, weight)
    bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_(a=sqrt(5)) of [r, in]
    a = (torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1) * bound
    b = torch.zeros(weight.shape[0], rank, device=weight.device)
    plain = _relative(frobenius(step.residual), frobenius(weight))
    return LoftQResult(step.quantized, a.to(weight.device), b, plain, (), 0)


def exact_step(rank: int) -> LowRankStep:
    """The paper's own step: a full SVD."""
    return lambda residual, _previous: exact_low_rank(residual, rank)


def fast_step(rank: int, generator: torch.Generator) -> FastStep:
    """The default step."""
    return FastStep(rank, generator)


def _relative(residual: float, norm: float) -> float:
    return residual / norm if norm else 0.0
