"""What LoftQ asks of a container's quantizer, and the plain-torch quantizer of codebook blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loftq_cli.numerics import blocks
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.feedback import FeedbackGains, feed_back
from loftq_cli.numerics.fitted import fit_levels, fit_scales
from loftq_cli.numerics.grids import Grid, Quantized, dequantize
from loftq_cli.numerics.lowrank import LowRank, frobenius


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


@dataclass(frozen=True)
class BlockQuantizer:
    """The plain-torch twin of the compiled quantizer, on any device. `levels` replace the codebook's, where it is a
    fitted one."""

    grid: BlockGrid
    levels: Tensor | None = None

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        quantized = blocks.quantize(target, self.grid)
        return QuantizeStep(quantized, self.restore(weight, quantized))

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        product = None if found is None else found.product(torch.bfloat16 if half else torch.float32)
        step = self.quantize_residual(weight, weight if product is None else weight - product.float())
        return QuantizeStep(step.quantized, step.residual.bfloat16(), step.residual_norm()) if half else step

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        return weight - dequantize(quantized, self.grid)

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        return self._fitted(weight, target, previous, column_weight, guards=True)

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        return self._fitted(weight, target, previous, column_weight, guards=False)

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        return feed_back(weight, product, step.residual, fed, gains)

    def _fitted(
        self,
        weight: Tensor,
        target: Tensor,
        previous: QuantizeStep | None,
        column_weight: Tensor | None,
        *,
        guards: bool,
    ) -> QuantizeStep:
        levels = self.grid.levels(target.device) if self.levels is None else self.levels
        before = None if previous is None else blocks_of(previous).absmax
        scales = fit_scales(target, self.grid, levels, previous=before, column_weight=column_weight, guards=guards)
        codes = blocks.assign(target, scales, self.grid, levels)
        quantized = QuantizedBlocks(codes, scales, self.levels)
        return QuantizeStep(quantized, weight - blocks.dequantize(quantized, self.grid))

    def with_levels(self, levels: Tensor) -> BlockQuantizer:
        """The same with other levels, float32 [2**bits], ascending."""
        return BlockQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Better levels for the codes and scales of `step`."""
        return fit_levels(target, blocks_of(step), self.grid, column_weight)


def blocks_of(step: QuantizeStep) -> QuantizedBlocks:
    """What a codebook grid gave."""
    assert isinstance(step.quantized, QuantizedBlocks), "blocks belong to a codebook grid"
    return step.quantized
