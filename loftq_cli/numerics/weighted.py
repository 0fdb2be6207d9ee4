"""LoftQ with data: the error that counts is that of the layer's outputs on its own inputs.

For inputs x with second moment S = E[x xᵀ], E‖(W − Q − BA) x‖² = ‖(W − Q − BA) R‖_F² for any R with R Rᵀ = S. For fixed
Q the best rank-r BA is SVD_r((W − Q) R) R⁻¹ (QERA, arXiv 2410.06040, theorem 1; CLoQ, arXiv 2501.18475; CALDERA, arXiv
2405.18886): R is square and regular, so (W − Q − BA) R ranges over (W − Q) R less all matrices of rank r, and
Eckart-Young applies. With S replaced by its diagonal, R is diagonal too (QERA-approx, L²QER).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.loftq import LoftQResult, LowRankStep, Quantizer, QuantizeStep
from loftq_cli.numerics.lowrank import LowRank, frobenius

DAMPING = 0.01  # share of the mean variance added to every input's, so that inputs hardly seen are not given up (GPTQ)


@dataclass(frozen=True)
class Whitening:
    """A root R of the second moment, R Rᵀ = S, scaled so that S has a mean variance of one.

    Attributes:
        root: float32 [in], the diagonal of R; or [in, in], lower triangular.
    """

    root: Tensor

    @property
    def variances(self) -> Tensor:
        """The diagonal of S, float32 [in]: what the error of each column of W counts."""
        return self.root.square() if self.root.ndim == 1 else self.root.square().sum(dim=1)

    def apply(self, residual: Tensor) -> Tensor:
        """E R of E [rows, in]."""
        return residual * self.root if self.root.ndim == 1 else residual @ self.root

    def undo(self, rows: Tensor) -> Tensor:
        """X R⁻¹ of X [rows, in]."""
        if self.root.ndim == 1:
            return rows / self.root
        return torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)


def whiten(moment: Tensor, *, damping: float = DAMPING) -> Whitening:
    """The root of a second moment: [in] is the diagonal of S, [in, in] all of it.

    A layer that saw only zeros gives the identity. The root of all of S is its Cholesky factor: any root will do, and
    this one costs a tenth of the symmetric one.
    """
    variances = moment if moment.ndim == 1 else moment.diagonal()
    mean = variances.double().mean()
    if not float(mean) > 0:
        return Whitening(torch.ones_like(variances, dtype=torch.float32))
    if moment.ndim == 1:
        return Whitening((moment.double() / mean + damping).sqrt().float())
    normal = moment.double() / mean
    normal.diagonal().add_(damping)
    return Whitening(torch.linalg.cholesky(normal).float())


@dataclass(frozen=True)
class WeightedLowRank:
    """BA that is best under a whitening.

    Attributes:
        white: the rank-r approximation of the whitened residual.
        plain: BA itself as an SVD, so that B and A share its singular values as LoftQ's do.
    """

    white: LowRank
    plain: LowRank


def weighted_low_rank(
    residual: Tensor, whitening: Whitening, low_rank: LowRankStep, previous: WeightedLowRank | None = None
) -> WeightedLowRank:
    """SVD_r(E R) R⁻¹ of E = W - Q, float32 [out, in].

    Args:
        low_rank: how to find the r directions; `previous` is where it may start.
    """
    white = low_rank(whitening.apply(residual), None if previous is None else previous.white)
    return WeightedLowRank(white, _product(white.u, whitening.undo((white.v * white.s).T)))


def _product(u: Tensor, rows: Tensor) -> LowRank:
    """`u` [out, r] times `rows` [r, in] as an SVD, where the columns of `u` are orthonormal or zero."""
    q, triangle = torch.linalg.qr(rows.T.double())  # rowsᵀ = q · triangle
    left, s, right = torch.linalg.svd(triangle.T)
    return LowRank((u.double() @ left).float(), s.float(), (q @ right.T).float())


@dataclass(frozen=True)
class WeightedResult:
    """LoftQ's result, whose `residuals` are the plain ones ‖W − Q − BA‖ / ‖W‖, and the errors that counted.

    Attributes:
        plain_residual: ‖(W − q(W)) R‖ / ‖W R‖.
        residuals: ‖(W − Q_t − B_t A_t) R‖ / ‖W R‖ after each step; the kept step has the smallest.
    """

    result: LoftQResult
    plain_residual: float
    residuals: tuple[float, ...]

    @property
    def residual(self) -> float:
        """The weighted residual of what was kept."""
        return self.residuals[self.result.best - 1]


Quantize = Callable[[Tensor, Tensor, "QuantizeStep | None"], QuantizeStep]


def absmax_of(quantizer: Quantizer) -> Quantize:
    """Quantization as LoftQ has it, which the weights do not touch."""
    return lambda weight, target, _previous: quantizer.quantize_residual(weight, target)


def weighted_loftq(
    weight: Tensor,
    quantize: Quantize,
    whitening: Whitening,
    *,
    iters: int,
    low_rank: LowRankStep,
    keep_last: bool = False,
) -> WeightedResult:
    """Alternate Q_t = q(W - B_{t-1} A_{t-1}) with the best B_t A_t for the whitening, from B_0 A_0 = 0.

    The best iterate is the one with the smallest weighted residual, unless `keep_last`.

    Args:
        weight: float32 [out, in].
        quantize: (weight, target, previous step) -> the step for the target.
        iters: T >= 1 alternating steps.
    """
    assert iters >= 1, "T = 0 has no low-rank step to weigh"
    norm, weighted_norm = frobenius(weight), frobenius(whitening.apply(weight))
    step = quantize(weight, weight, None)
    plain = _relative(step.residual, norm), _relative(whitening.apply(step.residual), weighted_norm)
    found: WeightedLowRank | None = None
    residuals: list[float] = []
    weighted: list[float] = []
    kept: tuple[int, QuantizeStep, WeightedLowRank] | None = None
    for t in range(1, iters + 1):
        if found is not None:
            step = quantize(weight, _less(weight, found.plain), step)
        found = weighted_low_rank(step.residual, whitening, low_rank, found)
        left = _less(step.residual, found.plain)
        residuals.append(_relative(left, norm))
        weighted.append(_relative(whitening.apply(left), weighted_norm))
        if kept is None or keep_last or weighted[-1] < weighted[kept[0] - 1]:
            kept = (t, step, found)
    assert kept is not None
    best, step, found = kept
    factors = found.plain
    result = LoftQResult(step.quantized, factors.lora_a, factors.lora_b, plain[0], tuple(residuals), best)
    return WeightedResult(result, plain[1], tuple(weighted))


def _less(matrix: Tensor, product: LowRank) -> Tensor:
    return torch.addmm(matrix, product.lora_b, product.lora_a, alpha=-1)


def _relative(matrix: Tensor, norm: float) -> float:
    return frobenius(matrix) / norm if norm else 0.0
