"""The rank-r step of LoftQ: the best rank-r approximation of a residual (LoftQ eq. 8-9).

`exact_low_rank` is the full SVD, the reference. `krylov_low_rank` is the default: a block Krylov space, deep and with
narrow blocks for LoftQ's first residual, and shallow afterwards, when it starts from the previous step's factors, as
LoftQ's steps hardly rotate the subspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.deterministic import eigh, lower_gram, product, svd
from loftq_cli.numerics.lowrank.krylov import orthonormal, ritz_pairs

FIRST_DEPTH = 12  # measured in scripts/bench/NOTES.md, as are the next ones
_FIRST_OF_SMALL = 9  # as accurate for fewer columns
_LARGE = 2048
# Later steps stay accurate with one and a half powers if the matrix has at least this many times the rank in columns,
# and with one if it is also large; with fewer columns they need two.
_STEADY_SHARE, _STEADIER_SHARE, _STEADIER = 12, 32, 4096

_SMALLEST_FOR_KRYLOV = 512  # below, the exact result takes milliseconds, and LoftQ's iterates depend on every digit
_LANES = 16  # rounding a product's width up to a multiple of this costs nothing
_SMALLEST_FOR_HALF = 512  # below, rounding the residual costs more than bfloat16 products save
SPREAD = 16.0  # s[0] / s[-1] up to which noise on the largest direction, even of bfloat16, cannot hide the smallest
_ROUGH_SPREAD = 256.0  # s[0] / s[-1] up to which that noise only blurs the smallest
MOST_ENERGY = 0.9  # share of the energy above which the rest would be mostly bfloat16's noise
_ROUGH_MOST_ENERGY = 0.999  # share of the energy above which that noise would be a large part of the rest
_LEAST_LEFT = 1e-3  # share of the energy below which the rest would be noise of float32 squares
SAFE_NORM = 1e12  # squares of norms within [1 / this, this], and their sums, stay in float32's range


@dataclass(frozen=True)
class LowRank:
    """U diag(s) Vᵀ: `u` [out, r] and `v` [in, r] have orthonormal columns, `s` [r] descends. All float32.

    Where s is zero, the column of `u` or of `v` is zero. U diag(s) Vᵀ is the orthogonal projection R V Vᵀ of the
    approximated matrix R, so ‖R - U diag(s) Vᵀ‖² = ‖R‖² - Σ s².
    """

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def lora_a(self) -> Tensor:
        """sqrt(S) Vᵀ, [r, in]."""
        return (self.v * self.s.sqrt()).T.contiguous()

    @property
    def lora_b(self) -> Tensor:
        """U sqrt(S), [out, r]."""
        return self.u * self.s.sqrt()

    def product(self, dtype: torch.dtype = torch.float32, *, out: Tensor | None = None) -> Tensor:
        """Return BA = U diag(s) Vᵀ [out, in], multiplied and rounded in `dtype`."""
        return product(self.lora_b.to(dtype), self.lora_a.to(dtype), out=out)

    @property
    def energy(self) -> float:
        """‖U diag(s) Vᵀ‖_F²."""
        return float(self.s.double().square().sum())

    @property
    def transposed(self) -> LowRank:
        """The approximation of the transposed matrix."""
        return LowRank(self.v, self.s, self.u)


def exact_low_rank(residual: Tensor, rank: int) -> LowRank:
    """Return the rank-r truncation of the full SVD of `residual`, float32 [out, in]."""
    u, s, vh = svd(residual)
    return LowRank(u[:, :rank].clone(), s[:rank].clone(), vh[:rank].T.clone())  # views would keep all of U and Vᵀ alive


def gram_low_rank(residual: Tensor, rank: int, *, careful: bool = True) -> LowRank:
    """Return the exact approximation from the eigenvectors of the smaller Gram matrix.

    With `careful` squares are computed in float64, so that squaring loses nothing.
    """
    if residual.shape[0] < residual.shape[1]:
        return gram_low_rank(residual.T, rank, careful=careful).transposed
    wide = residual.double() if careful else residual
    _, vectors = eigh(lower_gram(wide))
    basis = vectors[:, -rank:]
    return _decompose((wide @ basis).double(), basis.double())


def krylov_low_rank(
    residual: Tensor,
    rank: int,
    *,
    previous: LowRank | None = None,
    depth: int | None = None,
    generator: torch.Generator,
    norm: float | None = None,
) -> LowRank:
    """Approximate `residual` [out, in] with rank r, in the block Krylov space of `previous` or of random columns.

    If the matrix is small, or the space would be two thirds as wide, the Gram matrix is exact and as cheap, and is used
    instead. Squares are computed in float32 first, and again in float64 if the spectrum is too wide for that, or if so
    little of the residual is left that the errors of float32 squares would show in it.

    Args:
        residual: float32; or bfloat16, for which see `half_low_rank`.
        previous: the approximation of a similar residual, that of the last step.
        depth: powers of RᵀR in the space; by default FIRST_DEPTH or less without `previous`, one or two with it.
        generator: a CPU generator, which makes a run repeatable on any device.
        norm: ‖residual‖_F, if it is known already.
    """
    rank = min(rank, *residual.shape)
    norm = frobenius(residual) if norm is None else norm
    scale = _power_of_two(norm)
    if scale != 1.0:
        scaled = krylov_low_rank(residual * scale, rank, previous=previous, depth=depth, generator=generator)
        return LowRank(scaled.u, scaled.s / scale, scaled.v)
    space = KrylovSpace.plan(residual, rank, previous, depth)
    tries_float32 = previous is None or _narrow(previous.s)
    if space is None:
        found = gram_low_rank(residual, rank, careful=False) if tries_float32 else None
        return found if found is not None and _precise_enough(found, residual, norm) else gram_low_rank(residual, rank)
    start = space.start(residual, previous, generator)
    found = space.search(residual, start, careful=False) if tries_float32 else None
    return (
        found
        if found is not None and _precise_enough(found, residual, norm)
        else space.search(residual, start, careful=True)
    )


def half_low_rank(
    half: Tensor,
    rank: int,
    *,
    previous: LowRank | None = None,
    depth: int | None = None,
    generator: torch.Generator,
    norm: float,
    rough: bool = False,
) -> LowRank | None:
    """Return `krylov_low_rank` of a residual given in bfloat16, or None if its spectrum needs float32.

    Rounding changes the directions and their images by 2⁻⁹ at random, which costs the approximation of a narrow
    spectrum the square of that: less than 1e-5 of the residual, as `scripts/bench/NOTES.md` confirms. `refine` computes
    the exact projection on the same directions.

    Args:
        norm: ‖residual‖_F.
        rough: accept a wide spectrum too, or one that leaves hardly more than the noise of bfloat16: good enough if a
            later step makes up for what this approximation misses.
    """
    rank = min(rank, *half.shape)
    spread, most = (_ROUGH_SPREAD, _ROUGH_MOST_ENERGY) if rough else (SPREAD, MOST_ENERGY)
    space = KrylovSpace.plan(half, rank, previous, depth)
    if space is None or _power_of_two(norm) != 1.0 or not (previous is None or _narrow(previous.s, spread)):
        return None
    found = space.search(half, space.start(half, previous, generator), careful=False)
    return found if _narrow(found.s, spread) and found.energy <= most * norm**2 else None


def refine(residual: Tensor, found: LowRank) -> LowRank:
    """Project the float32 `residual` on the directions of `found`."""
    return refine_by(lambda basis: residual @ basis, found)


def refine_by(images: Callable[[Tensor], Tensor], found: LowRank) -> LowRank:
    """Do the same for a residual given by a function that computes R @ basis for a float32 basis [in, r]."""
    basis = orthonormal(found.v, found.v[:, :0], careful=True)
    return _decompose(images(basis).double(), basis.double())


@dataclass(frozen=True)
class KrylovSpace:
    """A block Krylov space: `width` columns to start from and `depth` powers of RᵀR.

    With `from_left` it starts from Rᵀ times known directions of the longer side, which adds half a power.
    """

    rank: int
    width: int
    depth: int
    from_left: bool = False

    @staticmethod
    def plan(residual: Tensor, rank: int, previous: LowRank | None, depth: int | None) -> KrylovSpace | None:
        """Return the space for a residual of this shape, or None if the Gram matrix is as cheap.

        Blocks half as wide as the rank find more with the same number of products than blocks as wide as the rank. A
        start from known directions includes all of them and needs hardly any depth.
        """
        width = _LANES * -(-(rank if previous is not None else (rank + 1) // 2) // _LANES)
        smaller = min(residual.shape)
        first = FIRST_DEPTH if smaller >= _LARGE else _FIRST_OF_SMALL
        powers = depth or (first if previous is None else _later_powers(smaller, rank))
        depth, from_left = int(powers), powers > int(powers)
        blocks = depth + 1 + from_left
        if smaller < _SMALLEST_FOR_KRYLOV or 3 * width * blocks > 2 * smaller or width * (depth + 1) < rank:
            return None
        return KrylovSpace(rank, width, depth, from_left)

    def start(self, residual: Tensor, previous: LowRank | None, generator: torch.Generator) -> Tensor:
        """Return the previous step's directions, completed with random ones, [shorter side, width]."""
        if residual.shape[0] < residual.shape[1]:
            return self.start(residual.T, None if previous is None else previous.transposed, generator)
        n, known = residual.shape[1], torch.empty(residual.shape[1], 0)
        if previous is not None and self.from_left:
            known = product(residual.T, previous.u[:, : self.width].to(residual.dtype)).float()
        elif previous is not None:
            known = previous.v[:, : self.width]
        fresh = torch.randn(n, self.width - known.shape[1], generator=generator) / math.sqrt(n)
        return torch.cat([known.to(residual.device), fresh.to(residual.device)], dim=1)

    def search(self, residual: Tensor, start: Tensor, *, careful: bool) -> LowRank:
        """Return the best approximation within the space."""
        if residual.shape[0] < residual.shape[1]:
            return self.search(residual.T, start, careful=careful).transposed
        pairs = ritz_pairs(residual, start, self.depth, self.rank, careful=careful)
        if not careful:
            s = pairs.captured.clamp(min=0).sqrt()
            return LowRank(pairs.images * torch.where(s > 0, s, torch.inf).reciprocal(), s, pairs.vectors)
        return refine(residual, LowRank(pairs.images, pairs.captured, pairs.vectors))


def _later_powers(smaller: int, rank: int) -> float:
    if smaller < _STEADY_SHARE * rank:
        return 2
    return 1.5 if smaller < max(_STEADIER, _STEADIER_SHARE * rank) else 1


def _decompose(image: Tensor, basis: Tensor) -> LowRank:
    """Return `image` [out, r] times `basis`ᵀ [r, in] (orthonormal) as an SVD; both float64."""
    values, turn = eigh(image.T @ image)
    s, turn = values.flip(0).clamp(min=0).sqrt(), turn.flip(1)
    inverse = torch.where(s > 0, s, torch.inf).reciprocal()
    return LowRank((image @ turn * inverse).float(), s.float(), (basis @ turn).float())


def frobenius(x: Tensor) -> float:
    """Return ‖x‖_F of a matrix.

    Sums are float32 within rows and float64 across them, or float64 throughout if squares could leave float32's range.
    """
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=1), dtype=torch.float64))
    if 1 / SAFE_NORM < norm < SAFE_NORM:
        return norm
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _power_of_two(norm: float) -> float:
    """Return the factor that brings squares of a matrix with this norm into float32's range; 1 if they are in it."""
    if norm == 0.0 or 1 / SAFE_NORM < norm < SAFE_NORM:
        return 1.0
    return 2.0 ** -max(-126, min(126, math.frexp(norm)[1]))


def _precise_enough(found: LowRank, residual: Tensor, norm: float) -> bool:
    """True if float32 squares were precise enough for the directions found and for the rest, if there is any."""
    complete = len(found.s) == min(residual.shape)
    return _narrow(found.s) and (complete or norm**2 - found.energy > _LEAST_LEFT * norm**2)


def _narrow(s: Tensor, spread: float = SPREAD) -> bool:
    return bool(s[0] <= spread * s[-1])


def half_is_faster(residual: Tensor) -> bool:
    """True if bfloat16 products are faster than float32 ones on this device, rounding included."""
    if min(residual.shape) < _SMALLEST_FOR_HALF:
        return False
    if residual.is_cuda:
        return _gpu_multiplies_bfloat16(residual.device)
    return residual.device.type == "cpu" and _cpu_multiplies_bfloat16()


@cache
def _gpu_multiplies_bfloat16(device: torch.device) -> bool:
    """True from compute capability 8.0 on, where tensor cores do; older GPUs emulate it."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public query as of torch 2.13
    return bool(supported and supported())
