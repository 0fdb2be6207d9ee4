"""The best directions of a matrix within a block Krylov space (Musco & Musco 2015, arXiv 1504.05477, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.deterministic import cholesky, eigh, lower_gram, product, qr

# Shares of its length that a column must keep in the projection for one round to do, and for two; and how far columns
# must stand apart, as the least diagonal entry of their correlations' Cholesky factor. float32 has seven digits, and
# half of them where it is squared.
_MUCH_LEFT = {True: 0.5, False: 2e-3}
_NOTHING_LEFT = 1e-5
_FAR_APART = {True: 0.1, False: 5e-2}
_ALIKE = {True: 1e-5, False: 2e-3}


@dataclass(frozen=True)
class RitzPairs:
    """The r directions that capture most of a matrix M [out, in] within a subspace, largest first.

    Attributes:
        vectors: float32 [in, r], orthonormal columns.
        images: M @ vectors, float32 [out, r], as exact as M's products are.
        captured: float32 [r], the squared norms of the images.
    """

    vectors: Tensor
    images: Tensor
    captured: Tensor


def ritz_pairs(matrix: Tensor, start: Tensor, depth: int, rank: int, *, careful: bool) -> RitzPairs:
    """Directions within the span of Q, MᵀM Q, ..., (MᵀM)^depth Q for Q = `start` [in, l], float32.

    Args:
        matrix: [out, in]; its dtype is that of the products.
        careful: squares are taken in float64. Squaring costs half the digits, which float32 affords only for narrow
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
    """`block` [in, l], orthogonal to `basis` [in, k] and with orthonormal columns, by Cholesky-QR.

    Where little is left of some column, or columns are nearly alike, float32 has lost their digits, and a second round
    restores orthogonality; where nothing is left, Householder QR fills the block up.
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
    """A round of Cholesky-QR, of one matrix or of each of a stack [..., n, l].

    Attributes:
        columns: orthonormal, where `sound`; fully so where `enough`. Both bool [...].
        projected: the columns before they were made so.
        before: their lengths before the projection, [..., l].
    """

    columns: Tensor
    projected: Tensor
    before: Tensor
    sound: Tensor
    enough: Tensor


def cholesky_qr(block: Tensor, basis: Tensor, *, careful: bool) -> QRRound:
    """Columns [..., n, l] less their projections on `basis` [..., n, k], made orthonormal."""
    before = block.square().sum(dim=-2).sqrt()
    block = _without(block, basis)
    wide = block.double() if careful else block
    gram = wide.mT @ wide
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # What counts is how columns differ in direction.
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
    """L⁻ᵀ of a lower triangle L [..., l, l]: a product with it takes half the time of solving for a tall block."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor.mT, identity, upper=True)


def _householder(block: Tensor, basis: Tensor) -> Tensor:
    """The same where columns vanish: a trace of noise drowns rounding errors, which may all lie in `basis`."""
    if not basis.shape[1]:
        return qr(block).Q
    generator = torch.Generator().manual_seed(basis.shape[1])  # other noise than what `basis` may be filled up with
    noise = torch.randn(block.shape, generator=generator).to(block.device)
    block = qr(_without(block, basis) + torch.finfo(torch.float32).eps * noise).Q
    for _ in range(2):  # twice is enough
        block = qr(_without(block, basis)).Q
    return block


def _without(block: Tensor, basis: Tensor) -> Tensor:
    """`block` less its projection on the orthonormal `basis`."""
    if not basis.shape[-1]:
        return block
    subtract = torch.baddbmm if block.dim() == 3 else torch.addmm
    return subtract(block, basis, basis.mT @ block, alpha=-1)
