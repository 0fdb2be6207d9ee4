"""LoftQ: alternate a quantized backbone with the rank-r SVD of what it misses (arXiv 2310.08659, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.numerics import blocks
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.lowrank import LowRank, exact_low_rank, krylov_low_rank


@dataclass(frozen=True)
class QuantizeStep:
    """Codes and scales chosen for a target, and W - Q float32 [out, in] for the weight."""

    quantized: QuantizedBlocks
    residual: Tensor


class Quantizer(Protocol):
    """The container's fake quantization, as LoftQ needs it."""

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` (W - BA) to Q and give W - Q. Both arguments float32 [out, in]."""


@dataclass(frozen=True)
class BlockQuantizer:
    """The plain-torch twin of the compiled quantizer, on any device."""

    grid: BlockGrid

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        quantized = blocks.quantize(target, self.grid)
        return QuantizeStep(quantized, weight - blocks.dequantize(quantized, self.grid))


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
    target = weight
    previous: LowRank | None = None
    residuals: list[float] = []
    plain = kept = None
    for step in range(1, iters + 1):
        quantized = quantizer.quantize_residual(weight, target)  # LoftQ eq. 7
        if plain is None:
            plain = _relative(frobenius(quantized.residual), norm)
        previous = low_rank(quantized.residual, previous)  # eq. 8-9
        a, b = previous.lora_a, previous.lora_b
        residuals.append(_relative(frobenius(torch.addmm(quantized.residual, b, a, alpha=-1)), norm))
        if kept is None or keep_last or residuals[-1] < residuals[kept[0] - 1]:
            kept = (step, quantized.quantized, a, b)
        if step < iters:
            target = torch.addmm(weight, b, a, alpha=-1)
    assert kept is not None and plain is not None
    best, codes, a, b = kept
    return LoftQResult(codes, a, b, plain, tuple(residuals), best)


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


def fast_step(rank: int, generator: torch.Generator) -> LowRankStep:
    """The default step: block Krylov, warm-started, within 0.1 % of the exact residual."""
    return lambda residual, previous: krylov_low_rank(residual, rank, previous=previous, generator=generator)


def frobenius(x: Tensor) -> float:
    """‖x‖_F, accumulated in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _relative(residual: float, norm: float) -> float:
    return residual / norm if norm else 0.0
