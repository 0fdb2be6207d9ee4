"""Error feedback: add the error of one step to the target of the next (`numerics.methods.refined`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loftq_cli.numerics.lowrank.truncate import frobenius


@dataclass(frozen=True)
class FeedbackGains:
    """U ← kept · U + added · E; the next target contains share · U."""

    kept: float
    added: float
    share: float


def feed_back(weight: Tensor, product: Tensor, residual: Tensor, fed: Tensor, gains: FeedbackGains) -> float:
    """Update U and compute the next target, in place; return ‖E‖_F for E = R - BA.

    `fed` is set to kept · U + added · E, and `residual` to the next target W - BA + share · U.

    Args:
        weight: W, float32 [out, in].
        product: BA, float32 or bfloat16.
        residual: R = W - Q, float32.
        fed: U, float32.
    """
    error = residual.sub_(product)
    norm = frobenius(error)
    # Separate products and sums, as in the compiled kernel: a fused multiply-add rounds differently.
    fed.mul_(gains.kept).add_(error * gains.added)
    residual.copy_(weight - product).add_(fed * gains.share)
    return norm
