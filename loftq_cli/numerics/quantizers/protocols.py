"""What LoftQ asks of a container's quantizer, and the plain-torch quantizer of codebook blocks."""

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
    """Codes and scales chosen for a target, and W - Q [out, in] for the weight: float32, or bfloat16 where asked for.

    `norm` is ‖W - Q‖_F before any rounding, where the quantizer took it on its way.
    """

    quantized: Quantized
    residual: Tensor
    norm: float | None = None

    def residual_norm(self) -> float:
        """‖W - Q‖_F."""
        return frobenius(self.residual) if self.norm is None else self.norm


@dataclass(frozen=True)
class Scratch:
    """Memory of a matrix's earlier steps that may be overwritten: fresh pages cost as much as a pass over them."""

    residual: Tensor
    codes: Tensor | None = None


class Quantizer(Protocol):
    """The container's fake quantization, as LoftQ needs it."""

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q and give W - Q. Both arguments float32 [out, in]."""


@runtime_checkable
class FusedQuantizer(Quantizer, Protocol):
    """A quantizer that makes its target W - BA by itself, block by block, so that it never goes through memory."""

    @property
    def grid(self) -> Grid:
        """The container's."""

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        """Quantize W - BA to Q and give W - Q; no `found`, no BA. The result may lie in `scratch`. `half`: BA is
        multiplied, and the residual rounded, in bfloat16. An error of 2⁻⁹ in the target's smaller part moves codes only
        where they were ties but for that; Q and ‖W - Q‖ stay exact."""

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """W - Q, float32 [out, in]."""


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
        """Quantize `target` to Q with fitted scales and give W - Q.

        Args:
            previous: an earlier step of this matrix, whose scales are the start. The squared error of `target` is never
                above what its scales give with the nearest codes. Its residual may be overwritten. None searches from
                scratch.
            column_weight: float32 [in], positive: the weight of the squared errors of a column; None weighs all alike.
        """


@runtime_checkable
class FeedingQuantizer(FittingQuantizer, Protocol):
    """One with cheaper passes for steps of error feedback, which promise nothing for a single step."""

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        """`quantize_fitted` with one fit of the scales, kept even where it is worse for a block."""

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        """`numerics.feedback.feed_back` with the residual of `step`, in one pass over memory."""


def blocks_of(step: QuantizeStep) -> QuantizedBlocks:
    """What a codebook grid gave."""
    assert isinstance(step.quantized, QuantizedBlocks), "blocks belong to a codebook grid"
    return step.quantized
