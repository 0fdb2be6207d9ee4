"""QA-LoRA (arXiv 2309.14717): an adapter that acts on inputs pooled over the quantization groups.

The adapter sees P x, where P sums each group of L inputs, so its update of W [out, in] is constant within a group:
ΔW = C ⊗ 1 with C = c · BA, A [r, in / L], B [out, r]. Such an update only changes the groups' zeros (section 3.3), so
it can be merged into them. The best C of rank r is the truncated SVD of the group means of the matrix to approximate.

PEFT pools by the mean and multiplies by the number of groups, so c = scaling · (in / L) / L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.lowrank.truncate import LowRank, krylov_low_rank


@dataclass(frozen=True)
class PooledStep:
    """A `LowRankStep` restricted to updates that are constant within groups of `group` inputs.

    In full width the approximation is U S (V ⊗ 1/√L)ᵀ, whose factors are again orthonormal. It is the projection of the
    residual on pooled directions, so LoftQ's formula for the remaining norm holds for it.
    """

    rank: int
    group: int
    generator: torch.Generator

    def __call__(self, residual: Tensor, previous: LowRank | None) -> LowRank:
        """Return the best C ⊗ 1 of rank r for `residual`, float32 [out, in] with in a multiple of the group."""
        means = group_means(residual, self.group)
        found = krylov_low_rank(means, min(self.rank, *means.shape), generator=self.generator)
        root = math.sqrt(self.group)
        return LowRank(found.u, found.s * root, found.v.repeat_interleave(self.group, dim=0) / root)


def group_means(residual: Tensor, group: int) -> Tensor:
    """Return the means over groups of columns: [out, in] → [out, in / group]."""
    return residual.unflatten(1, (-1, group)).mean(-1)


def pooled(lora_a: Tensor, group: int) -> Tensor:
    """Convert A of full width [r, in], equal within groups, to A on pooled inputs [r, in / group]."""
    return lora_a[:, ::group].contiguous()


def peft_constant(in_features: int, group: int) -> float:
    """Return the factor that PEFT's QA-LoRA layer applies to BA besides its scaling: (in / L) / L for group sums."""
    return in_features / group / group


def widened(product: Tensor, group: int) -> Tensor:
    """Expand C [out, in / group] to C ⊗ 1 [out, in]."""
    return product.repeat_interleave(group, dim=1)


def lost_in_integer_zeros(compact: Tensor, quantized: Tensor) -> float:
    """Return the share of an update lost by rounding it to integer zero points: ‖C - s · round(C / s)‖ / ‖C‖.

    Args:
        compact: C [out, in / group].
        quantized: Q [out, in]; a group's step s is the smallest distance between its values.
    """
    values = quantized.unflatten(1, (compact.shape[1], -1)).sort(dim=-1).values
    gaps = values.diff(dim=-1)
    floor = 1e-3 * (values[..., -1:] - values[..., :1])  # smaller gaps come from rounding equal codes
    step = torch.where(gaps > floor, gaps, torch.inf).amin(-1)
    moved = torch.where(step.isinf(), 0.0, torch.round(compact / step) * step)
    norm = torch.linalg.vector_norm(compact)
    return float(torch.linalg.vector_norm(compact - moved) / norm) if norm else 0.0
