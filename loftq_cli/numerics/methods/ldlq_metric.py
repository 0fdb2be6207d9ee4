"""The metric of LDLQ: a triangular root of the second moment, and of what is left without absorbed directions.

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

from loftq_cli.numerics.lowrank.deterministic import cholesky, one_thread
from loftq_cli.numerics.quantizers.columns import Columns

DAMPING = 0.01  # share of the mean variance added to every input's (GPTQ)
ABSORBED = 0.05  # ε, the share of an error's energy that counts although the correction absorbs it
RUN = 64  # columns of a diagonal block of the factor
STRIP = 512  # columns of a product with a triangular factor


@dataclass(frozen=True)
class Metric:
    """A positive definite H = M Mᵀ.

    Attributes:
        matrix: H, float32 [in, in].
        root: M, float32 [in, in], upper triangular with a positive diagonal.
    """

    matrix: Tensor
    root: Tensor

    def apply(self, error: Tensor) -> Tensor:
        """Return E M for E [rows, in]."""
        width = self.root.shape[0]
        image = torch.empty_like(error)
        for start in range(0, width, STRIP):
            stop = min(start + STRIP, width)
            torch.mm(error[:, :stop], self.root[:stop, start:stop], out=image[:, start:stop])
        return image

    def undo(self, rows: Tensor) -> Tensor:
        """Return X M⁻¹ for X [rows, in]."""
        solve = one_thread(lambda root: torch.linalg.solve_triangular(root, rows, upper=True, left=False))
        return solve(self.root)

    def without(self, directions: Tensor | None, kept: float = ABSORBED) -> Eased:
        """Return M (I - (1 - ε) V Vᵀ) Mᵀ for orthonormal columns V [in, r] and ε = `kept`; None for no columns.

        The factor of the middle is upper triangular: K Kᵀ = I - (1 - ε) V Vᵀ, found from its last block of columns to
        its first. Above the diagonal blocks it has rank r, so the product M K costs r multiplications an entry.
        """
        if directions is None:
            return Eased(self.matrix, self.root, self.root[:, :0])
        factor = _SlimFactor.of(directions.double(), 1 - kept)
        return Eased(self.matrix, factor.times(self.root, directions), (1 - kept) ** 0.5 * (self.root @ directions))


@dataclass(frozen=True)
class _SlimFactor:
    """The upper triangular K with K Kᵀ = I - c V Vᵀ, by blocks of `RUN` columns.

    Attributes:
        corners: the diagonal blocks, float64.
        shares: above the diagonal, the block's columns are V times the transpose of this, float64 [RUN, r].
    """

    pieces: list[Columns]
    corners: list[Tensor]
    shares: list[Tensor]

    @classmethod
    def of(cls, v: Tensor, c: float) -> _SlimFactor:
        """Factorise for V float64 [in, r] and 0 <= c < 1."""
        left = c * torch.eye(v.shape[1], dtype=torch.float64, device=v.device)  # I - V left Vᵀ is still to factorise
        pieces = list(Columns(0, v.shape[0]).pieces(RUN))
        corners: list[Tensor] = []
        shares: list[Tensor] = []
        for columns in reversed(pieces):
            image = v[columns.slice] @ left
            corner = _upper_root(_identity_minus(image @ v[columns.slice].T))
            share = -torch.linalg.solve_triangular(corner, image, upper=True)
            left = left + share.T @ share
            corners.append(corner)
            shares.append(share)
        return cls(pieces, corners[::-1], shares[::-1])

    def times(self, root: Tensor, directions: Tensor) -> Tensor:
        """Return M K for an upper triangular M."""
        found = torch.zeros_like(root)
        before = torch.zeros_like(directions)  # M V over the columns so far
        for columns, corner, share in zip(self.pieces, self.corners, self.shares):
            rows = slice(0, columns.stop)
            strip = root[rows, columns.slice]
            found[rows, columns.slice] = strip @ corner.float() + before[rows] @ share.T.float()
            before[rows] += strip @ directions[columns.slice]
        return found


@dataclass(frozen=True)
class Eased:
    """H' = H - P Pᵀ = M' M'ᵀ, a metric in which errors that the correction absorbs cost almost nothing.

    Attributes:
        matrix: H, float32 [in, in].
        root: M', float32 [in, in], upper triangular with a positive diagonal.
        absorbed: P, float32 [in, r].
    """

    matrix: Tensor
    root: Tensor
    absorbed: Tensor

    @property
    def conditional_variances(self) -> Tensor:
        """The variance of each input given all later ones, float32 [in]."""
        return self.root.diagonal().square()

    def square(self, columns: slice) -> Tensor:
        """Return H' for some columns, [width, width]."""
        part = self.absorbed[columns]
        return torch.addmm(self.matrix[columns, columns], part, part.T, alpha=-1)

    def feedback(self, columns: Columns, tile: int) -> Tensor:
        """Return what the columns' targets take of the errors of every column up to their end, [stop, width].

        It is zero from a column's own tile on.
        """
        root = self.root[: columns.stop, columns.slice]
        if tile == 1:
            shares = root / root.diagonal(-columns.start)
        else:
            shares = torch.zeros_like(root)
            for piece in Columns(0, columns.width).pieces(tile):
                stop = columns.start + piece.start
                corner = root[stop : stop + piece.width, piece.slice]
                above = root[:stop, piece.slice]
                shares[:stop, piece.slice] = torch.linalg.solve_triangular(corner, above, upper=True, left=False)
        width = columns.width
        tiles = torch.arange(width, device=root.device) // tile
        own = shares[columns.start :]
        shares[columns.start :] = torch.where(tiles.unsqueeze(1) < tiles, own, 0.0)
        return shares

    def variances(self, columns: Columns, tile: int) -> Tensor:
        """Return the variance of each input given the inputs of all later tiles, [width]."""
        if tile == 1:
            return self.root.diagonal()[columns.slice].square()
        corners = [self.root[piece.slice, piece.slice] for piece in columns.pieces(tile)]
        return torch.cat([corner.square().sum(dim=1) for corner in corners])


def metric(moment: Tensor, device: torch.device | str = "cpu", *, damping: float = DAMPING) -> Metric:
    """Return the metric of a second moment, [in] or [in, in], scaled to a mean variance of 1 and damped.

    For a layer that saw only zeros, return the identity.
    """
    matrix = torch.diag(moment.double()) if moment.ndim == 1 else moment.double()
    mean = matrix.diagonal().mean()
    if not (0 <= float(mean) < torch.inf):  # or NaN: nothing that a layer saw
        raise torch.linalg.LinAlgError("the second moment is not finite and positive")
    if float(mean) == 0:
        identity = torch.eye(moment.shape[0], dtype=torch.float32, device=device)
        return Metric(identity, identity)
    matrix = matrix.div_(mean) if matrix is not moment else matrix / mean
    matrix.diagonal().add_(damping)
    return Metric(matrix.float().to(device), _upper_root(matrix).float().to(device))


def _upper_root(matrix: Tensor) -> Tensor:
    """Return the upper triangular M with M Mᵀ = `matrix`."""
    factor, failed = cholesky(matrix.flip(0, 1))
    if int(failed):
        raise torch.linalg.LinAlgError("the second moment is not positive definite")
    return factor.flip(0, 1)


def _identity_minus(matrix: Tensor) -> Tensor:
    matrix = matrix.neg()
    matrix.diagonal().add_(1)
    return matrix
