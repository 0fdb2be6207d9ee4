"""The interfaces that LoftQ requires of a container's quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from loftq_cli.numerics.grids.blocks import QuantizedBlocks
from loftq_cli.numerics.grids.grid import Grid, Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank, frobenius
from loftq_cli.numerics.quantizers.feedback import FeedbackGains


@dataclass(frozen=True)
class QuantizeStep:
    """Codes and scales chosen for a target, and W - Q [out, in] for the weight, in float32 or, on request, bfloat16.

    `norm` is ‖W - Q‖_F before any rounding, or None if the quantizer did not compute it.
    """

    quantized: Quantized
    residual: Tensor
    norm: float | None = None

    def residual_norm(self) -> float:
        """‖W - Q‖_F."""
        return frobenius(self.residual) if self.norm is None else self.norm


@dataclass(frozen=True)
class Scratch:
    """Buffers of a matrix's earlier steps that may be overwritten: fresh pages cost as much as a pass over them."""

    residual: Tensor
    codes: Tensor | None = None


class Quantizer(Protocol):
    """The container's fake quantization, as LoftQ needs it."""

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q and compute W - Q. Both arguments float32 [out, in]."""


@runtime_checkable
class FusedQuantizer(Quantizer, Protocol):
    """A quantizer that computes its target W - BA itself, block by block, so that it is never written to memory."""

    @property
    def grid(self) -> Grid:
        """The container's grid."""

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        """Quantize W - BA to Q and compute W - Q.

        Args:
            found: BA; None is zero.
            half: multiply BA, and round the residual, in bfloat16. An error of 2⁻⁹ in the smaller part of the target
                changes codes only if they were nearly ties; Q and ‖W - Q‖ stay exact.
            scratch: memory that the result may use.
        """

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """Return W - Q, float32 [out, in]."""


@runtime_checkable
class FittingQuantizer(Quantizer, Protocol):
    """A quantizer that can choose its scales (and zeros) for the least squared error on the container's own grid."""

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        """Quantize `target` to Q with fitted scales and compute W - Q.

        Args:
            previous: an earlier step for this matrix, whose scales are the start. The squared error of `target` never
                exceeds that of these scales with the nearest codes. Its residual may be overwritten. None searches from
                scratch.
            column_weight: float32 [in], positive: the weight of a column's squared errors; None weights all columns
                equally.
        """


@runtime_checkable
class FeedingQuantizer(FittingQuantizer, Protocol):
    """A quantizer with cheaper passes for steps with error feedback, which guarantee nothing for a single step."""

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        """Do `quantize_fitted` with a single fit of the scales, which is kept even for blocks where it is worse."""

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        """Apply `numerics.quantizers.feedback.feed_back` to the residual of `step`, in one pass over memory."""


def blocks_of(step: QuantizeStep) -> QuantizedBlocks:
    """Return the codes and scales of a step on a codebook grid."""
    assert isinstance(step.quantized, QuantizedBlocks), "blocks need a codebook grid"
    return step.quantized
