"""The low-rank step on a stack of equal matrices: `numerics.lowrank` and `numerics.krylov` in products of stacks.

Nothing here asks the device for a number. What single matrices decide by a comparison is computed both ways and chosen
by a mask, or, where that would be another algorithm, told in the flags `sound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.deterministic import eigh
from loftq_cli.numerics.lowrank.krylov import cholesky_qr
from loftq_cli.numerics.lowrank.truncate import MOST, SAFE_NORM, SPREAD, KrylovSpace, LowRank


@dataclass(frozen=True)
class LowRanks:
    """U diag(s) Vᵀ of every matrix, as `lowrank.LowRank`: u [b, out, r], s [b, r], v [b, in, r], float32."""

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
        """BA [b, out, in], multiplied and rounded in `dtype`."""
        return self.lora_b.to(dtype) @ self.lora_a.to(dtype)

    def narrow(self) -> Tensor:
        """bool [b]: whether noise on the largest direction cannot hide the smallest. False for NaN."""
        return self.s[:, 0] <= SPREAD * self.s[:, -1]

    def where(self, mask: Tensor, other: LowRanks | None = None) -> LowRanks:
        """These where bool [b] holds, elsewhere the other ones: none is zeros."""
        mask = mask[:, None, None]
        others = (0.0, 0.0, 0.0) if other is None else (other.u, other.s, other.v)
        u, v = torch.where(mask, self.u, others[0]), torch.where(mask, self.v, others[2])
        return LowRanks(u, torch.where(mask[:, 0], self.s, others[1]), v)


@dataclass(frozen=True)
class Found:
    """Approximations, and of which matrices they are what `krylov_low_rank` or `half_low_rank` would give: bool [b]."""

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
) -> Found:
    """The rank-r approximations of `residuals`, float32 [b, out, in], from the same spaces as of single matrices.

    Args:
        norms: ‖residual‖_F, float64 [b].
        previous: those of the step before; finite.
        generators: one for each matrix, on the CPU.
        half: products in bfloat16 where a Krylov space is taken, as `half_low_rank`.
    """
    if residuals.shape[1] < residuals.shape[2]:
        turned = None if previous is None else previous.transposed
        found = low_ranks(residuals.mT, norms, rank, previous=turned, generators=generators, half=half)
        return Found(found.ranks.transposed, found.sound)
    one = None if previous is None else LowRank(previous.u[0], previous.s[0], previous.v[0])
    space = KrylovSpace.plan(residuals[0], rank, one, None)  # hangs on shapes alone
    if space is None:
        found = _from_gram(residuals, rank, in_range(norms))
        return Found(found.ranks, found.sound & found.ranks.narrow())
    matrices = residuals.bfloat16() if half else residuals
    start = _start(space, matrices, previous, generators)
    found = _ritz(matrices, start, space, in_range(norms))
    sound = found.sound & found.ranks.narrow()
    if half:
        sound &= found.ranks.energies <= MOST * norms.square()
    return Found(found.ranks, sound)


def refine_stack(residuals: Tensor, ranks: LowRanks) -> Found:
    """Apply `lowrank.truncate.refine` to each: project float32 `residuals` exactly onto the directions of `ranks`."""
    every = torch.ones(len(residuals), dtype=torch.bool, device=residuals.device)
    basis = _orthonormal(Flagged(ranks.v, every), ranks.v[..., :0], careful=True)
    return _decomposed((residuals @ basis.values).double(), basis.values.double(), basis.sound)


def norms_of(matrices: Tensor) -> Tensor:
    """‖·‖_F of each of [b, out, in]: float64 [b], as `lowrank.frobenius` where `in_range`."""
    rows = torch.linalg.vector_norm(matrices, dim=2)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def in_range(norms: Tensor) -> Tensor:
    """bool [b]: whether squares stay in float32's range. False for zero and NaN."""
    return (norms > 1 / SAFE_NORM) & (norms < SAFE_NORM)


@dataclass(frozen=True)
class Flagged:
    """Matrices [b, m, n], and which of them are what they should be: bool [b]."""

    values: Tensor
    sound: Tensor


def _start(
    space: KrylovSpace, matrices: Tensor, previous: LowRanks | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """`KrylovSpace.start` of each, float32 [b, in, width]; matrices [b, out, in] are not wider than high."""
    known = matrices.new_empty(*matrices.mT.shape[:2], 0, dtype=torch.float32)
    if previous is not None and space.from_left:
        known = (matrices.mT @ previous.u[..., : space.width].to(matrices.dtype)).float()
    elif previous is not None:
        known = previous.v[..., : space.width]
    n, width = matrices.shape[2], space.width - known.shape[2]
    fresh = [torch.randn(n, width, generator=generator) / math.sqrt(n) for generator in generators]
    return torch.cat([known, torch.stack(fresh).to(matrices.device)], dim=2)


def _ritz(matrices: Tensor, start: Tensor, space: KrylovSpace, sound: Tensor) -> Found:
    """`krylov.ritz_pairs` in float32 squares, with the singular values that follow."""
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
    squares = _harmless(images.mT @ images, sound)
    captured, turn = eigh(squares.values)
    captured, turn = captured[:, -space.rank :].flip(1), turn[..., -space.rank :].flip(2)
    s = captured.clamp(min=0).sqrt()
    return Found(LowRanks(images @ turn * _inverse(s), s, basis @ turn), squares.sound)


def _from_gram(residuals: Tensor, rank: int, sound: Tensor) -> Found:
    """`lowrank.gram_low_rank` in float32 squares; residuals [b, out, in] are not wider than high."""
    squares = _harmless(residuals.mT @ residuals, sound)
    _, vectors = eigh(squares.values)
    basis = vectors[..., -rank:]
    return _decomposed((residuals @ basis).double(), basis.double(), squares.sound)


def _decomposed(images: Tensor, basis: Tensor, sound: Tensor) -> Found:
    """`lowrank._decompose` of each: images [b, out, r] times basisᵀ [b, r, in] (orthonormal) as SVDs; both float64."""
    squares = _harmless(images.mT @ images, sound)
    values, turn = eigh(squares.values)
    s, turn = values.flip(1).clamp(min=0).sqrt(), turn.flip(2)
    return Found(LowRanks((images @ turn * _inverse(s)).float(), s.float(), (basis @ turn).float()), squares.sound)


def _orthonormal(block: Flagged, basis: Tensor, *, careful: bool) -> Flagged:
    """`krylov.orthonormal` of each, as far as Cholesky-QR goes. The second round is made for all of them and taken
    where one matrix alone would have made it: to ask would cost more than to compute."""
    once = cholesky_qr(block.values, basis, careful=careful)
    twice = cholesky_qr(once.columns, basis, careful=careful)
    columns = torch.where(once.enough[:, None, None], once.columns, twice.columns)
    return Flagged(columns, block.sound & once.sound & (once.enough | twice.sound))


def _harmless(squares: Tensor, sound: Tensor) -> Flagged:
    """[b, n, n] with the identity where there are NaN or infinity, which eigenvalue solvers may not survive."""
    sound = sound & torch.isfinite(squares).all(2).all(1)
    one = torch.eye(squares.shape[1], dtype=squares.dtype, device=squares.device)
    return Flagged(torch.where(sound[:, None, None], squares, one), sound)


def _inverse(s: Tensor) -> Tensor:
    """1 / s as factors of columns, [b, 1, r]; 0 where s is."""
    return torch.where(s > 0, s, torch.inf).reciprocal().unsqueeze(1)
