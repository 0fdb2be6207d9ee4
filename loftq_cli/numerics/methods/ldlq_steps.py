"""The metric of LDLQ, and its two half-steps: one sweep over the columns, and new scales for fixed codes.

With H = M Mᵀ for an upper triangular M, tr(E H Eᵀ) = ‖E M‖², and column j of E M holds the error of column j plus what
earlier columns owe: e_j m_jj + Σ_{i<j} e_i m_ij. The target of column j is therefore x_j + Σ_{i<j} e_i m_ij / m_jj:
rounding it makes column j of E M as small as the grid allows, m_jj times a rounding error. This is GPTQ (arXiv
2210.17323), which QuIP (arXiv 2307.13304, theorem 6) shows to be the best rounding that feeds errors back linearly.
m_jj² is the variance of input j given all later inputs.

Errors in the directions of the rank-r correction cost almost nothing, as the next low-rank step absorbs them. With V
[in, r] the right singular vectors of (W - Q) M, the error after that step is at least ‖E M (I - V Vᵀ)‖, so a sweep uses
H' = M (I - (1 - ε) V Vᵀ) Mᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.deterministic import cholesky
from loftq_cli.numerics.quantizers.columns import (
    ColumnQuantizer,
    Columns,
    FusedSweep,
    Sweep,
    quantize_by_tiles,
)

DAMPING = 0.01  # share of the mean variance added to every input's (GPTQ)
ABSORBED = 0.05  # ε, the share of an error's energy that counts although the correction absorbs it
RUN = 64  # columns whose errors are fed back one by one; later columns receive them as one product
_STRIP = 256  # columns of a product with a triangular factor


@dataclass(frozen=True)
class Metric:
    """A positive definite H = M Mᵀ.

    Attributes:
        root: M, float32 [in, in], upper triangular with a positive diagonal.
    """

    root: Tensor

    @property
    def variances(self) -> Tensor:
        """The diagonal of H, float32 [in]."""
        return self.root.square().sum(dim=1)

    @property
    def conditional_variances(self) -> Tensor:
        """The variance of each input given all later ones, float32 [in]."""
        return self.root.diagonal().square()

    def apply(self, error: Tensor) -> Tensor:
        """Return E M for E [rows, in]."""
        width = self.root.shape[0]
        product = torch.empty_like(error)
        for start in range(0, width, _STRIP):
            stop = min(start + _STRIP, width)
            torch.mm(error[:, :stop], self.root[:stop, start:stop], out=product[:, start:stop])
        return product

    def undo(self, rows: Tensor) -> Tensor:
        """Return X M⁻¹ for X [rows, in]."""
        return torch.linalg.solve_triangular(self.root, rows, upper=True, left=False)

    def without(self, directions: Tensor, kept: float) -> Metric:
        """Return M (I - (1 - ε) V Vᵀ) Mᵀ for orthonormal columns V [in, r] and ε = `kept`.

        The factor of the middle is upper triangular: K Kᵀ = I - (1 - ε) V Vᵀ, found from its last block of columns to
        its first. Above the diagonal block it has rank r, so the product M K costs r multiplications an entry.
        """
        width, rank = directions.shape
        v = directions.double()
        left = (1 - kept) * torch.eye(rank, dtype=torch.float64, device=v.device)
        pieces = list(Columns(0, width).pieces(RUN))
        corners: list[Tensor] = []
        shares: list[Tensor] = []
        for columns in reversed(pieces):
            here = v[columns.slice]
            image = here @ left
            corner = _upper_root(_identity_minus(image @ here.T))
            share = -torch.linalg.solve_triangular(corner, image, upper=True)
            left = left + share.T @ share
            corners.append(corner)
            shares.append(share)
        return Metric(self._times(pieces, directions, corners[::-1], shares[::-1]))

    def _times(self, pieces: list[Columns], directions: Tensor, corners: list[Tensor], shares: list[Tensor]) -> Tensor:
        """Return M K."""
        product = torch.zeros_like(self.root)
        before = torch.zeros_like(directions)  # M V over the columns so far
        for columns, corner, share in zip(pieces, corners, shares):
            rows = slice(0, columns.stop)
            strip = self.root[rows, columns.slice]
            product[rows, columns.slice] = strip @ corner.float() + before[rows] @ share.T.float()
            before[rows] += strip @ directions[columns.slice]
        return product


def metric(moment: Tensor, device: torch.device | str = "cpu", *, damping: float = DAMPING) -> Metric:
    """Return the metric of a second moment, [in] or [in, in], scaled to a mean variance of 1 and damped.

    For a layer that saw only zeros, return the identity.
    """
    matrix = torch.diag(moment.double()) if moment.ndim == 1 else moment.double()
    mean = matrix.diagonal().mean()
    if not float(mean) > 0:
        return Metric(torch.eye(moment.shape[0], dtype=torch.float32, device=device))
    matrix = matrix / mean
    matrix.diagonal().add_(damping)
    return Metric(_upper_root(matrix).float().to(device))


def _upper_root(matrix: Tensor) -> Tensor:
    """Return the upper triangular M with M Mᵀ = `matrix`."""
    factor, failed = cholesky(matrix.flip(0, 1))
    if int(failed):
        raise torch.linalg.LinAlgError("the second moment is not positive definite")
    return factor.flip(0, 1).contiguous()


def _identity_minus(matrix: Tensor) -> Tensor:
    matrix = matrix.neg()
    matrix.diagonal().add_(1)
    return matrix


@dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Attributes:
        values: Q, float32 [out, in].
        target: what each column was rounded from, float32 [out, in].
    """

    quantized: Quantized
    values: Tensor
    target: Tensor


def sweep_columns(weight: Tensor, sweep: Sweep, found: Metric) -> Swept:
    """Quantize `weight` X, float32 [out, in], from the first column to the last, with errors fed back."""
    width = weight.shape[1]
    feedback, variances = _feedback(found, sweep.tile)
    errors, values, target = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)
    for block in Columns(0, width).pieces(sweep.block):
        whole = block.slice
        target[:, whole] = torch.addmm(weight[:, whole], errors[:, : block.start], feedback[: block.start, whole])
        sweep.begin_block(block, target[:, whole], variances[whole])
        for run in block.pieces(RUN):
            here, inside = run.slice, slice(block.start, run.start)
            if run.start > block.start:
                target[:, here] += errors[:, inside] @ feedback[inside, here]
            values[:, here] = _quantize_run(sweep, run, target[:, here], weight[:, here], feedback[here, here])
            errors[:, here] = weight[:, here] - values[:, here]
    return Swept(sweep.quantized(), values, target)


def _quantize_run(sweep: Sweep, run: Columns, target: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
    quantize = sweep.quantize_columns if isinstance(sweep, FusedSweep) else None
    if quantize is None:
        return quantize_by_tiles(sweep, run, target, weight, feedback)
    return quantize(run, target, weight, feedback)


def _feedback(found: Metric, tile: int) -> tuple[Tensor, Tensor]:
    """Return the shares of earlier errors [in, in], zero inside tiles, and the variances given later tiles [in]."""
    root = found.root
    if tile == 1:
        shares = root / root.diagonal()
        shares.diagonal().zero_()
        return shares, root.diagonal().square()
    shares, variances = torch.zeros_like(root), torch.empty_like(root.diagonal())
    for columns in Columns(0, root.shape[0]).pieces(tile):
        here, before = columns.slice, slice(0, columns.start)
        corner = root[here, here]
        shares[before, here] = torch.linalg.solve_triangular(corner, root[before, here], upper=True, left=False)
        variances[here] = corner.square().sum(dim=1)
    return shares, variances


def refit(swept: Swept, weight: Tensor, quantizer: ColumnQuantizer, block: int, found: Metric) -> Swept:
    """Change the parameters of every block, from the first to the last, so that ‖E M‖ falls with fixed codes.

    For one parameter with Q's derivative D [out, width], the best change is ⟨E H, D⟩ / ⟨D H, D⟩ by row, both over the
    block's columns. It is rounded as the container stores it, and taken over in the rows where ‖E M‖ then falls.
    """
    values, quantized = swept.values, swept.quantized
    errors = weight - values
    for columns in Columns(0, weight.shape[1]).pieces(block):
        here = columns.slice
        rows = found.root[here, columns.start :]  # H = M Mᵀ, where these rows of M begin
        corner = rows @ rows.T
        slope = None
        for number, direction in enumerate(quantizer.parameters(quantized, columns)):
            if slope is None:
                slope = errors @ (found.root[:, columns.start :] @ rows.T)
            curve = ((direction @ corner) * direction).sum(dim=1)
            change = torch.where(curve > 0, (slope * direction).sum(dim=1) / curve.clamp(min=1e-30), 0.0)
            moved = quantizer.move(quantized, columns, number, change)
            step = moved.values - values[:, here]
            cost = ((step @ corner) * step).sum(dim=1) - 2 * (step * slope).sum(dim=1)
            better = cost < 0
            quantizer.put(quantized, columns, number, torch.where(better, moved.after, moved.before))
            step = torch.where(better.unsqueeze(1), step, 0.0)
            values[:, here] += step
            errors[:, here] -= step
            slope = slope - step @ corner
    return Swept(quantized, values, swept.target)
