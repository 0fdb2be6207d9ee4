"""The low-rank step on a stack of matrices of one shape: `truncate` and `krylov` with batched products.

Nothing here waits for a number from the device. Where the code for single matrices branches, both results are computed
and a mask selects one; if the other branch would be another algorithm, the matrix is flagged as not `sound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.deterministic import eigh
from loftq_cli.numerics.lowrank.krylov import cholesky_qr
from loftq_cli.numerics.lowrank.truncate import MOST_ENERGY, SAFE_NORM, SPREAD, KrylovSpace, LowRank


@dataclass(frozen=True)
class LowRanks:
    """U diag(s) Vᵀ of every matrix, as `truncate.LowRank`: u [b, out, r], s [b, r], v [b, in, r], float32."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def lora_a(self) -> Tensor:
        """sqrt(S) Vᵀ, [b, r, in]."""
        return (self.v * self.s.sqrt().unsqueeze(1)).mT.contiguous()

    @property
    def lora_b(self) -> Tensor:
        """U sqrt(S), [b, out, r]."""
        return self.u * self.s.sqrt().unsqueeze(1)

    @property
    def energies(self) -> Tensor:
        """‖U diag(s) Vᵀ‖_F², float64 [b]."""
        return self.s.double().square().sum(1)

    @property
    def transposed(self) -> LowRanks:
        """The approximations of the transposed matrices."""
        return LowRanks(self.v, self.s, self.u)

    def product(self, dtype: torch.dtype) -> Tensor:
        """Return BA [b, out, in], multiplied and rounded in `dtype`."""
        return self.lora_b.to(dtype) @ self.lora_a.to(dtype)

    def narrow(self) -> Tensor:
        """Return bool [b]: True if noise on the largest direction cannot hide the smallest. False for NaN."""
        return self.s[:, 0] <= SPREAD * self.s[:, -1]

    def where(self, mask: Tensor, other: LowRanks | None = None) -> LowRanks:
        """Return these where `mask` [b] is true and `other` elsewhere; None stands for zeros."""
        mask = mask[:, None, None]
        others = (0.0, 0.0, 0.0) if other is None else (other.u, other.s, other.v)
        u, v = torch.where(mask, self.u, others[0]), torch.where(mask, self.v, others[2])
        return LowRanks(u, torch.where(mask[:, 0], self.s, others[1]), v)


@dataclass(frozen=True)
class FlaggedLowRanks:
    """Approximations, and bool [b]: True if they are what `krylov_low_rank` or `half_low_rank` would return."""

    ranks: LowRanks
    sound: Tensor


def low_ranks(
    residuals: Tensor,
    norms: Tensor,
    rank: int,
    *,
    previous: LowRanks | None,
    generators: Sequence[torch.Generator],
    half: bool,
) -> FlaggedLowRanks:
    """Return rank-r approximations of `residuals`, float32 [b, out, in], from the same spaces as for single matrices.

    Args:
        norms: ‖residual‖_F, float64 [b].
        previous: the approximations of the step before; they must be finite.
        generators: one for each matrix, on the CPU.
        half: with a Krylov space, compute products in bfloat16 as `half_low_rank` does.
    """
    if residuals.shape[1] < residuals.shape[2]:
        turned = None if previous is None else previous.transposed
        found = low_ranks(residuals.mT, norms, rank, previous=turned, generators=generators, half=half)
        return FlaggedLowRanks(found.ranks.transposed, found.sound)
    one = None if previous is None else LowRank(previous.u[0], previous.s[0], previous.v[0])
    space = KrylovSpace.plan(residuals[0], rank, one, None)  # depends on shapes only
    if space is None:
        found = _from_gram(residuals, rank, in_range(norms))
        return FlaggedLowRanks(found.ranks, found.sound & found.ranks.narrow())
    matrices = residuals.bfloat16() if half else residuals
    start = _start(space, matrices, previous, generators)
    found = _ritz(matrices, start, space, in_range(norms))
    sound = found.sound & found.ranks.narrow()
    if half:
        sound &= found.ranks.energies <= MOST_ENERGY * norms.square()
    return FlaggedLowRanks(found.ranks, sound)


def refine_stack(residuals: Tensor, ranks: LowRanks) -> FlaggedLowRanks:
    """Apply `truncate.refine` to each: project float32 `residuals` exactly onto the directions of `ranks`."""
    every = torch.ones(len(residuals), dtype=torch.bool, device=residuals.device)
    basis = _orthonormal(Flagged(ranks.v, every), ranks.v[..., :0], careful=True)
    return _decomposed((residuals @ basis.values).double(), basis.values.double(), basis.sound)


def norms_of(matrices: Tensor) -> Tensor:
    """Return ‖·‖_F of each of [b, out, in], float64 [b]; the same as `truncate.frobenius` for norms `in_range`."""
    rows = torch.linalg.vector_norm(matrices, dim=2)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def in_range(norms: Tensor) -> Tensor:
    """Return bool [b]: True if squares stay in float32's range. False for zero and NaN."""
    return (norms > 1 / SAFE_NORM) & (norms < SAFE_NORM)


@dataclass(frozen=True)
class Flagged:
    """Matrices [b, m, n], and bool [b]: True for those that are valid."""

    values: Tensor
    sound: Tensor


def _start(
    space: KrylovSpace, matrices: Tensor, previous: LowRanks | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return `KrylovSpace.start` of each, float32 [b, in, width], for matrices [b, out, in] with in <= out."""
    known = matrices.new_empty(*matrices.mT.shape[:2], 0, dtype=torch.float32)
    if previous is not None and space.from_left:
        known = (matrices.mT @ previous.u[..., : space.width].to(matrices.dtype)).float()
    elif previous is not None:
        known = previous.v[..., : space.width]
    n, width = matrices.shape[2], space.width - known.shape[2]
    fresh = [torch.randn(n, width, generator=generator) / math.sqrt(n) for generator in generators]
    return torch.cat([known, torch.stack(fresh).to(matrices.device)], dim=2)


def _ritz(matrices: Tensor, start: Tensor, space: KrylovSpace, sound: Tensor) -> FlaggedLowRanks:
    """Apply `krylov.ritz_pairs` with float32 squares to each, and compute the singular values."""
    width, levels = space.width, space.depth + 1
    basis = start.new_empty(*start.shape[:2], width * levels)
    images = start.new_empty(*matrices.shape[:2], width * levels)
    block = start
    for level in range(levels):
        here = slice(level * width, (level + 1) * width)
        fresh = _orthonormal(Flagged(block, sound), basis[..., : here.start], careful=False)
        basis[..., here], sound = fresh.values, fresh.sound
        image = matrices @ fresh.values.to(matrices.dtype)
        images[..., here] = image
        if level + 1 < levels:
            block = (matrices.mT @ image).float()
    squares = _replace_nonfinite(images.mT @ images, sound)
    captured, turn = eigh(squares.values)
    captured, turn = captured[:, -space.rank :].flip(1), turn[..., -space.rank :].flip(2)
    s = captured.clamp(min=0).sqrt()
    return FlaggedLowRanks(LowRanks(images @ turn * _inverse(s), s, basis @ turn), squares.sound)


def _from_gram(residuals: Tensor, rank: int, sound: Tensor) -> FlaggedLowRanks:
    """Apply `truncate.gram_low_rank` with float32 squares to each of [b, out, in], with in <= out."""
    squares = _replace_nonfinite(residuals.mT @ residuals, sound)
    _, vectors = eigh(squares.values)
    basis = vectors[..., -rank:]
    return _decomposed((residuals @ basis).double(), basis.double(), squares.sound)


def _decomposed(images: Tensor, basis: Tensor, sound: Tensor) -> FlaggedLowRanks:
    """Apply `truncate._decompose` to each: images [b, out, r] times basisᵀ [b, r, in] (orthonormal), both float64."""
    squares = _replace_nonfinite(images.mT @ images, sound)
    values, turn = eigh(squares.values)
    s, turn = values.flip(1).clamp(min=0).sqrt(), turn.flip(2)
    ranks = LowRanks((images @ turn * _inverse(s)).float(), s.float(), (basis @ turn).float())
    return FlaggedLowRanks(ranks, squares.sound)


def _orthonormal(block: Flagged, basis: Tensor, *, careful: bool) -> Flagged:
    """Apply the Cholesky-QR of `krylov.orthonormal` to each.

    The second round is computed for all of them and used only where a single matrix would need it: waiting for the
    answer would cost more than the computation.
    """
    once = cholesky_qr(block.values, basis, careful=careful)
    twice = cholesky_qr(once.columns, basis, careful=careful)
    columns = torch.where(once.enough[:, None, None], once.columns, twice.columns)
    return Flagged(columns, block.sound & once.sound & (once.enough | twice.sound))


def _replace_nonfinite(squares: Tensor, sound: Tensor) -> Flagged:
    """Replace matrices [b, n, n] that contain NaN or infinity, which may crash eigenvalue solvers, by the identity."""
    sound = sound & torch.isfinite(squares).all(2).all(1)
    one = torch.eye(squares.shape[1], dtype=squares.dtype, device=squares.device)
    return Flagged(torch.where(sound[:, None, None], squares, one), sound)


def _inverse(s: Tensor) -> Tensor:
    """Return 1 / s as factors of columns, [b, 1, r]; 0 where s is 0."""
    return torch.where(s > 0, s, torch.inf).reciprocal().unsqueeze(1)
