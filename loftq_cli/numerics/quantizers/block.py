"""The plain-torch quantizer of codebook grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids import blocks
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.grids.grid import Quantized, dequantize
from loftq_cli.numerics.lowrank.truncate import LowRank
from loftq_cli.numerics.quantizers.block_scales import fit_levels, fit_scales
from loftq_cli.numerics.quantizers.feedback import FeedbackGains, feed_back
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, Scratch, blocks_of


@dataclass(frozen=True)
class BlockQuantizer:
    """The plain-torch twin of the compiled quantizer, on any device.

    `levels` replace those of a fitted codebook.
    """

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
        """Return the same quantizer with other levels, float32 [2**bits], ascending."""
        return BlockQuantizer(self.grid, levels)

    def fit_levels(self, target: Tensor, step: QuantizeStep, *, column_weight: Tensor | None = None) -> Tensor:
        """Return better levels for the codes and scales of `step`."""
        return fit_levels(target, blocks_of(step), self.grid, column_weight)
