"""Error feedback: what one step misses, added to what the next one quantizes (`numerics.refined`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loftq_cli.numerics.lowrank.truncate import frobenius


@dataclass(frozen=True)
class FeedbackGains:
    """U ← kept U + added E, of which `share` goes into the next target."""

    kept: float
    added: float
    share: float


def feed_back(weight: Tensor, product: Tensor, residual: Tensor, fed: Tensor, gains: FeedbackGains) -> float:
    """With E = R - BA: U ← kept U + added E in the memory of `fed`, the next target W - BA + share U in that of
    `residual`, and ‖E‖_F as the answer.

    Args:
        weight: W, float32 [out, in].
        product: BA, float32 or bfloat16.
        residual: R = W - Q, float32.
        fed: U, float32.
    """
    error = residual.sub_(product)
    norm = frobenius(error)
    # Products and sums apart, as the compiled kernel has them: a fused one rounds differently.
    fed.mul_(gains.kept).add_(error * gains.added)
    residual.copy_(weight - product).add_(fed * gains.share)
    return norm
