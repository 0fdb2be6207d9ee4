"""LoftQ with data: minimise the error of the layer's outputs on its own inputs.

For inputs x with second moment S = E[x xᵀ], E‖(W − Q − BA) x‖² = ‖(W − Q − BA) R‖_F² for any R with R Rᵀ = S. For fixed
Q the best rank-r BA is SVD_r((W − Q) R) R⁻¹ (QERA, arXiv 2410.06040, theorem 1; CLoQ, arXiv 2501.18475; CALDERA, arXiv
2405.18886): R is square and invertible, so BA R ranges over all matrices of rank r, and Eckart-Young applies to
(W − Q) R − BA R. With S replaced by its diagonal, R is diagonal too (QERA-approx, L²QER).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize
from loftq_cli.numerics.lowrank.truncate import LowRank, frobenius
from loftq_cli.numerics.methods.loftq import LoftQResult, LowRankStep
from loftq_cli.numerics.quantizers.protocols import Quantizer

DAMPING = 0.01  # share of the mean variance added to every input's, so that rarely active inputs still count (GPTQ)


@dataclass(frozen=True)
class Whitening:
    """A root R of the second moment, R Rᵀ = S, scaled so that the mean variance in S is one.

    Attributes:
        root: float32 [in], the diagonal of R; or [in, in], lower triangular.
    """

    root: Tensor

    @property
    def variances(self) -> Tensor:
        """The diagonal of S, float32 [in]: the weight of the error of each column of W."""
        return self.root.square() if self.root.ndim == 1 else self.root.square().sum(dim=1)

    def apply(self, residual: Tensor) -> Tensor:
        """Return E R for E [rows, in]."""
        return residual * self.root if self.root.ndim == 1 else residual @ self.root

    def undo(self, rows: Tensor) -> Tensor:
        """Return X R⁻¹ for X [rows, in]."""
        if self.root.ndim == 1:
            return rows / self.root
        return torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)


def whiten(moment: Tensor, *, damping: float = DAMPING) -> Whitening:
    """Return the root of a second moment, given as the diagonal of S [in] or as all of S [in, in].

    For a layer that saw only zeros, return the identity. The root of all of S is its Cholesky factor: any root will do,
    and this one costs a tenth of the symmetric one.
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
class WeightedStep:
    """A `LowRankStep`: SVD_r(E R) R⁻¹ for E = W - Q, written as an SVD so that B and A share the singular values.

    Attributes:
        inner: the step that finds the r directions of E R.
    """

    whitening: Whitening
    inner: LowRankStep

    def __call__(self, residual: Tensor, previous: LowRank | None) -> LowRank:
        white = self.inner(self.whitening.apply(residual), None if previous is None else self._whitened(previous))
        return product_of(white.u, self.whitening.undo((white.v * white.s).T))

    def _whitened(self, previous: LowRank) -> LowRank:
        """Return the start: the row space of an earlier BA R."""
        return LowRank(previous.u, previous.s, torch.linalg.qr(self.whitening.apply(previous.v.T).T).Q)


def product_of(u: Tensor, rows: Tensor) -> LowRank:
    """Return `u` [out, r] times `rows` [r, in] as an SVD; the columns of `u` must be orthonormal or zero."""
    q, triangle = torch.linalg.qr(rows.T.double())  # rowsᵀ = q · triangle
    left, s, right = torch.linalg.svd(triangle.T)
    return LowRank((u.double() @ left).float(), s.float(), (q @ right.T).float())


@dataclass(frozen=True)
class WeightedResult:
    """LoftQ's result, whose `residuals` are the unweighted ones ‖W − Q − BA‖ / ‖W‖, and the weighted errors.

    Attributes:
        plain_residual: ‖(W − q(W)) R‖ / ‖W R‖.
        residual: ‖(W − Q − BA) R‖ / ‖W R‖ of the step that was kept.
    """

    result: LoftQResult
    plain_residual: float
    residual: float


def weighted_loftq(
    weight: Tensor,
    quantizer: Quantizer,
    whitening: Whitening,
    *,
    iters: int,
    low_rank: LowRankStep,
    keep_last: bool = False,
) -> WeightedResult:
    """Alternate Q_t = q(W - B_{t-1} A_{t-1}) with the best B_t A_t for the whitening, from B_0 A_0 = 0.

    The iterate with the smallest weighted residual is kept, or the last one if `keep_last`.

    Args:
        weight: float32 [out, in].
        iters: T >= 1 alternating steps.
        low_rank: the step that finds the directions; it becomes the inner step of a `WeightedStep`.
    """
    assert iters >= 1, "T = 0 has no low-rank step to weight"
    norm, weighted_norm = frobenius(weight), frobenius(whitening.apply(weight))
    weighted_step = WeightedStep(whitening, low_rank)
    step = quantizer.quantize_residual(weight, weight)
    plain = _relative(step.residual, norm), _relative(whitening.apply(step.residual), weighted_norm)
    found: LowRank | None = None
    residuals: list[float] = []
    kept: tuple[float, int, Quantized, LowRank] | None = None
    for t in range(1, iters + 1):
        if found is not None:
            step = quantizer.quantize_residual(weight, _minus(weight, found))
        found = weighted_step(step.residual, found)
        left = _minus(step.residual, found)
        residuals.append(_relative(left, norm))
        weighted = _relative(whitening.apply(left), weighted_norm)
        if kept is None or keep_last or weighted < kept[0]:
            kept = (weighted, t, step.quantized, found)
    assert kept is not None
    weighted, best, codes, found = kept
    result = LoftQResult(codes, found.lora_a, found.lora_b, plain[0], tuple(residuals), best)
    return WeightedResult(result, plain[1], weighted)


def weighted_result(
    weight: Tensor, found: LoftQResult, grid: Grid, quantizer: Quantizer, whitening: Whitening
) -> WeightedResult:
    """Add the weighted residuals to the result of a method other than `weighted_loftq`."""
    norm = frobenius(whitening.apply(weight))
    plain = quantizer.quantize_residual(weight, weight).residual
    left = torch.addmm(weight - dequantize(found.quantized, grid), found.lora_b, found.lora_a, alpha=-1)
    return WeightedResult(found, _relative(whitening.apply(plain), norm), _relative(whitening.apply(left), norm))


def _minus(matrix: Tensor, product: LowRank) -> Tensor:
    return torch.addmm(matrix, product.lora_b, product.lora_a, alpha=-1)


def _relative(matrix: Tensor, norm: float) -> float:
    return frobenius(matrix) / norm if norm else 0.0
