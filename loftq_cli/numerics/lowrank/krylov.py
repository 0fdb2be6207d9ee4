"""The best directions of a matrix within a block Krylov space (Musco & Musco 2015, arXiv 1504.05477, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.deterministic import cholesky, eigh, lower_gram, product, qr

# The share of its length that a column must keep after projection for one round to suffice, and for two; and how far
# apart columns must be, as the least diagonal entry of the Cholesky factor of their correlations. float32 has seven
# digits, and half as many once squared. Keys: `careful`.
_MUCH_LEFT = {True: 0.5, False: 2e-3}
_NOTHING_LEFT = 1e-5
_FAR_APART = {True: 0.1, False: 5e-2}
_ALIKE = {True: 1e-5, False: 2e-3}


@dataclass(frozen=True)
class RitzPairs:
    """The r directions of a subspace that capture most of a matrix M [out, in], largest first.

    Attributes:
        vectors: float32 [in, r], orthonormal columns.
        images: M @ vectors, float32 [out, r], as exact as products in M's dtype.
        captured: float32 [r], the squared norms of the images.
    """

    vectors: Tensor
    images: Tensor
    captured: Tensor


def ritz_pairs(matrix: Tensor, start: Tensor, depth: int, rank: int, *, careful: bool) -> RitzPairs:
    """Return the best directions in the span of Q, MᵀM Q, ..., (MᵀM)^depth Q for Q = `start` [in, l], float32.

    Args:
        matrix: [out, in]; products are computed in its dtype.
        careful: compute squares in float64. Squaring costs half the digits, which float32 can afford only for narrow
            spectra.
    """
    width = start.shape[1]
    basis = start.new_empty(matrix.shape[1], width * (depth + 1))
    images = start.new_empty(matrix.shape[0], width * (depth + 1))
    block = start
    for level in range(depth + 1):
        here = slice(level * width, (level + 1) * width)
        basis[:, here] = orthonormal(block, basis[:, : here.start], careful=careful)
        image = product(matrix, basis[:, here].to(matrix.dtype))
        images[:, here] = image
        if level < depth:
            image = orthonormal(image, image[:, :0], careful=True) if careful else image
            block = product(matrix.T, image.to(matrix.dtype)).float()
    captured, vectors = eigh(lower_gram(images.double() if careful else images))
    captured, vectors = captured[-rank:].flip(0).float(), vectors[:, -rank:].flip(1).float()
    return RitzPairs(basis @ vectors, images @ vectors, captured)


def orthonormal(block: Tensor, basis: Tensor, *, careful: bool) -> Tensor:
    """Return `block` [in, l] made orthogonal to `basis` [in, k] and with orthonormal columns, by Cholesky-QR.

    If little is left of some column, or columns are nearly parallel, float32 has lost digits and a second round
    restores orthogonality; if nothing is left, Householder QR completes the block.
    """
    for _ in range(2):
        done = cholesky_qr(block, basis, careful=careful)
        if not done.sound:
            tiny = torch.finfo(torch.float32).tiny
            return _householder(done.projected / done.before.max().clamp(min=tiny), basis)
        block = done.columns
        if done.enough:
            break
    return block


@dataclass(frozen=True)
class QRRound:
    """The result of one round of Cholesky-QR on one matrix or on each of a stack [..., n, l].

    Attributes:
        columns: nearly orthonormal if `sound`, and to full precision if `enough`.
        projected: the columns after the projection, before they were orthonormalised.
        before: the lengths of the columns before the projection, [..., l].
        sound: bool [...], True if the Cholesky factorisation succeeded and kept enough digits.
        enough: bool [...], True if a second round is not needed.
    """

    columns: Tensor
    projected: Tensor
    before: Tensor
    sound: Tensor
    enough: Tensor


def cholesky_qr(block: Tensor, basis: Tensor, *, careful: bool) -> QRRound:
    """Subtract from `block` [..., n, l] its projection on `basis` [..., n, k] and orthonormalise its columns."""
    before = block.square().sum(dim=-2).sqrt()
    block = _without(block, basis)
    wide = block.double() if careful else block
    gram = wide.mT @ wide
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # Only the directions of the columns matter here, not their lengths.
    factor, failed = cholesky(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    apart = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    left = (lengths / before).amin(-1)
    return QRRound(
        columns=block @ (_inverse(factor) / lengths.unsqueeze(-1)).float(),
        projected=block,
        before=before,
        sound=(failed == 0) & (apart > _ALIKE[careful]) & (left > _NOTHING_LEFT),
        enough=(apart > _FAR_APART[careful]) & (left > _MUCH_LEFT[careful]),
    )


def _inverse(factor: Tensor) -> Tensor:
    """Return L⁻ᵀ of a lower triangle L [..., l, l]; multiplying a tall block by it takes half as long as solving."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor.mT, identity, upper=True)


def _householder(block: Tensor, basis: Tensor) -> Tensor:
    """Do the same if columns vanish: a little noise outweighs rounding errors, which may all lie in `basis`."""
    if not basis.shape[1]:
        return qr(block).Q
    generator = torch.Generator().manual_seed(basis.shape[1])  # unlike that of noise that `basis` may contain
    noise = torch.randn(block.shape, generator=generator).to(block.device)
    block = qr(_without(block, basis) + torch.finfo(torch.float32).eps * noise).Q
    for _ in range(2):  # twice is enough
        block = qr(_without(block, basis)).Q
    return block


def _without(block: Tensor, basis: Tensor) -> Tensor:
    """Return `block` minus its projection on the orthonormal `basis`."""
    if not basis.shape[-1]:
        return block
    subtract = torch.baddbmm if block.dim() == 3 else torch.addmm
    return subtract(block, basis, basis.mT @ block, alpha=-1)
