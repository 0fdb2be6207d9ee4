"""The rank-r step of LoftQ: the best rank-r approximation of a residual (LoftQ eq. 8-9).

`exact_low_rank` is the full SVD, the reference. `krylov_low_rank` is the default: a block Krylov space (Musco & Musco
2015, arXiv 1504.05477), deep for LoftQ's first residual and shallow afterwards, where it starts from the previous
step's factors because LoftQ's steps hardly turn the subspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from loftq_cli.numerics.threads import one_thread, product

FIRST_DEPTH = 6  # what the first step misses, no later step recovers: measured in scripts/bench/NOTES.md
LATER_DEPTH = 2

_SMALLEST_FOR_KRYLOV = 512  # below, the exact answer costs milliseconds, and LoftQ's course there hangs on every digit
_LANES = 16  # product widths in multiples of this cost no more than the next smaller width
_SMALLEST_FOR_HALF = 512  # below, rounding the residual costs more than bfloat16 products save
_HALF_SPREAD = 16.0  # s[0] / s[-1] up to which bfloat16's noise on the largest direction cannot hide the smallest
_SAFE_NORM = 1e12  # squares of norms within [1 / this, this] stay in float32's range with room for sums
_MUCH_LEFT, _NOTHING_LEFT = 1e-2, 1e-5  # shares of a column that outlive the projection: float32 has seven digits


_eigh, _cholesky = one_thread(torch.linalg.eigh), one_thread(torch.linalg.cholesky_ex)
_qr, _svd = one_thread(torch.linalg.qr), one_thread(partial(torch.linalg.svd, full_matrices=False))


@dataclass(frozen=True)
class LowRank:
    """U diag(s) Vᵀ: `u` [out, r] and `v` [in, r] have orthonormal columns, `s` [r] descends. All float32.

    Where s is zero the columns of one of them are zero. U diag(s) Vᵀ is the orthogonal projection R V Vᵀ of what was
    approximated, so ‖R - U diag(s) Vᵀ‖² = ‖R‖² - Σ s².
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

    @property
    def transposed(self) -> LowRank:
        """The approximation of the transposed matrix."""
        return LowRank(self.v, self.s, self.u)


def exact_low_rank(residual: Tensor, rank: int) -> LowRank:
    """The rank-r truncation of the full SVD of `residual`, float32 [out, in]."""
    u, s, vh = _svd(residual)
    return LowRank(u[:, :rank], s[:rank], vh[:rank].T)


def gram_low_rank(residual: Tensor, rank: int) -> LowRank:
    """Exact to float32: the eigenvectors of the smaller Gram matrix, in float64 so that squaring loses nothing."""
    if residual.shape[0] < residual.shape[1]:
        return gram_low_rank(residual.T, rank).transposed
    wide = residual.double()
    _, vectors = _eigh(wide.T @ wide)
    basis = vectors[:, -rank:]
    return _decompose(wide @ basis, basis)


def krylov_low_rank(
    residual: Tensor,
    rank: int,
    *,
    previous: LowRank | None = None,
    depth: int | None = None,
    oversample: int = 10,
    generator: torch.Generator,
    half: Tensor | None = None,
    norm: float | None = None,
) -> LowRank:
    """Rank-r approximation of `residual` [out, in] from the block Krylov space of `previous` and random columns.

    The space is found with bfloat16 products where the machine is faster at them; the approximation is then the
    float32 projection of the residual on the best r directions of it. Where the matrix is small or the space
    would be two thirds as wide, the Gram matrix is exact and as cheap, and is taken.

    Args:
        previous: the approximation of a similar residual: the last step's.
        depth: powers of RᵀR in the space; by default FIRST_DEPTH without `previous`, LATER_DEPTH with it.
        oversample: random columns beyond the rank in a space that starts without `previous`.
        generator: a CPU generator; its draws are what makes a run repeatable on any device.
        half: the residual in bfloat16, where the quantizer has written it already.
        norm: ‖residual‖_F, where it is known already.
    """
    rank = min(rank, *residual.shape)
    width = _LANES * -(-(rank + (oversample if previous is None else 0)) // _LANES)
    depth = depth or (FIRST_DEPTH if previous is None else LATER_DEPTH)
    if min(residual.shape) < _SMALLEST_FOR_KRYLOV or 3 * width * (depth + 1) > 2 * min(residual.shape):
        return gram_low_rank(residual, rank)
    scale = _power_of_two(frobenius(residual) if norm is None else norm)
    if scale != 1.0:
        scaled = krylov_low_rank(
            residual * scale, rank, previous=previous, depth=depth, oversample=oversample, generator=generator
        )
        return LowRank(scaled.u, scaled.s / scale, scaled.v)
    if residual.shape[0] < residual.shape[1]:
        back = None if previous is None else previous.transposed
        turned = None if half is None else half.T
        return _krylov(residual.T, turned, rank, width, depth, back, generator).transposed
    return _krylov(residual, half, rank, width, depth, previous, generator)


def _krylov(
    residual: Tensor,
    half: Tensor | None,
    rank: int,
    width: int,
    depth: int,
    previous: LowRank | None,
    generator: torch.Generator,
) -> LowRank:
    """`krylov_low_rank` for a residual at least as tall as wide and of moderate size."""
    start = _start(residual.shape[1], width, previous, generator).to(residual.device)
    if half_is_faster(residual) and (previous is None or _narrow(previous.s)):
        rounded = residual.bfloat16() if half is None else half
        found = _project(residual, _best_directions(rounded, start, depth, rank))
        if _narrow(found.s):
            return found
    return _project(residual, _best_directions(residual, start, depth, rank))


def _start(n_in: int, width: int, previous: LowRank | None, generator: torch.Generator) -> Tensor:
    """[in, width]: the previous step's directions, filled up with random ones."""
    known = torch.empty(n_in, 0) if previous is None else previous.v[:, :width]
    fresh = torch.randn(n_in, width - known.shape[1], generator=generator) / math.sqrt(n_in)
    return torch.cat([known, fresh.to(known.device)], dim=1)


def _best_directions(matrix: Tensor, start: Tensor, depth: int, rank: int) -> Tensor:
    """The r orthogonal directions [in, r] that capture most of `matrix` [out, in] within the Krylov space of `start`.

    Squaring costs half the digits. float32 affords that only for narrow spectra, which a bfloat16 `matrix` promises.
    """
    narrow = matrix.dtype == torch.bfloat16
    width = start.shape[1]
    basis = start.new_empty(matrix.shape[1], width * (depth + 1))
    images = start.new_empty(matrix.shape[0], width * (depth + 1))
    block = start
    for level in range(depth + 1):
        here = slice(level * width, (level + 1) * width)
        basis[:, here] = _orthonormal(block, basis[:, : here.start])
        image = product(matrix, basis[:, here].to(matrix.dtype))
        images[:, here] = image
        if level < depth:
            block = product(matrix.T, image if narrow else _orthonormal(image, image[:, :0])).float()
    wide = images if narrow else images.double()
    _, vectors = _eigh(wide.T @ wide)
    return basis @ vectors[:, -rank:].flip(1).float()


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """`block` [in, l], orthogonal to `basis` [in, k] and with orthonormal columns, by Cholesky-QR in float64.

    Where little is left of some column, float32 has lost its digits, and a second round restores orthogonality; where
    nothing is left, Householder QR fills the block up.
    """
    for _ in range(2):
        before = block.norm(dim=0).max()
        block = _without(block, basis)
        wide = block.double()
        factor, failed = _cholesky(wide.T @ wide)
        left = factor.diagonal().min()
        if failed or left <= _NOTHING_LEFT * before:
            return _householder(block / before.clamp(min=torch.finfo(torch.float32).tiny), basis)
        block = torch.linalg.solve_triangular(factor.float().T, block, upper=True, left=False)
        if left > _MUCH_LEFT * before:
            break
    return block


def _householder(block: Tensor, basis: Tensor) -> Tensor:
    """The same where columns vanish: a trace of noise drowns rounding errors, which may all lie in `basis`."""
    if not basis.shape[1]:
        return _qr(block).Q
    generator = torch.Generator().manual_seed(basis.shape[1])  # other noise than what `basis` may be filled up with
    noise = torch.randn(block.shape, generator=generator).to(block.device)
    block = _qr(_without(block, basis) + torch.finfo(torch.float32).eps * noise).Q
    for _ in range(2):  # twice is enough
        block = _qr(_without(block, basis)).Q
    return block


def _without(block: Tensor, basis: Tensor) -> Tensor:
    """`block` less its projection on the orthonormal `basis`."""
    return torch.addmm(block, basis, basis.T @ block, alpha=-1) if basis.shape[1] else block


def _project(residual: Tensor, directions: Tensor) -> LowRank:
    """R V Vᵀ for V the orthonormalised `directions` [in, r], as an SVD."""
    orthonormal = _orthonormal(directions, directions[:, :0])
    return _decompose((residual @ orthonormal).double(), orthonormal.double())


def _decompose(image: Tensor, basis: Tensor) -> LowRank:
    """`image` [out, r] times `basis`ᵀ [r, in] (orthonormal) as an SVD; both float64."""
    values, turn = _eigh(image.T @ image)
    s, turn = values.flip(0).clamp(min=0).sqrt(), turn.flip(1)
    inverse = torch.where(s > 0, s, torch.inf).reciprocal()
    return LowRank((image @ turn * inverse).float(), s.float(), (basis @ turn).float())


def frobenius(x: Tensor) -> float:
    """‖x‖_F of a matrix: float32 within rows, float64 across them, and throughout where squares could leave float32."""
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=1), dtype=torch.float64))
    if 1 / _SAFE_NORM < norm < _SAFE_NORM:
        return norm
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _power_of_two(norm: float) -> float:
    """What to multiply a matrix of this norm with, so that squares stay in float32's range; 1 where they do."""
    if norm == 0.0 or 1 / _SAFE_NORM < norm < _SAFE_NORM:
        return 1.0
    return 2.0 ** -max(-126, min(126, math.frexp(norm)[1]))


def _narrow(s: Tensor) -> bool:
    return bool(s[0] <= _HALF_SPREAD * s[-1])


def half_is_faster(residual: Tensor) -> bool:
    """Whether bfloat16 products beat float32 ones on this device, rounding included."""
    if min(residual.shape) < _SMALLEST_FOR_HALF:
        return False
    return residual.is_cuda or (residual.device.type == "cpu" and _cpu_multiplies_bfloat16())


@cache
def _cpu_multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public query as of torch 2.13
    return bool(supported and supported())
