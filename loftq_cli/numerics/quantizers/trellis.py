"""The quantizer of trellis grids: the Viterbi algorithm for the codes, and for fixed codes the best scales.

A block's scale is that of least squared error for its codes, as in `numerics.quantizers.block_scales`. Blocks of a tile
have different scales, so the Viterbi algorithm weighs every weight's error by its scale squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids import trellis
from loftq_cli.numerics.grids.blocks import QuantizedBlocks, round_to
from loftq_cli.numerics.grids.grid import Quantized, dequantize
from loftq_cli.numerics.grids.trellis import TrellisGrid, regions, row_blocks, row_panels, spread, values
from loftq_cli.numerics.quantizers import viterbi
from loftq_cli.numerics.quantizers.block_scales import reciprocal, sum_blocks
from loftq_cli.numerics.quantizers.feedback import FeedbackGains, feed_back
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, blocks_of
from loftq_cli.numerics.quantizers.viterbi import Encode

_FIRST_FITS = 2  # rounds of codes and scales from the start
_LARGEST = 64.0  # in units of the scale: far above the table, and its square stays small
_SMALLEST_GAIN = 1e-12  # of the largest in the tile


@dataclass(frozen=True)
class TrellisQuantizer:
    """Quantizes with a trellis on any device; `encode` finds the codes of sequences."""

    grid: TrellisGrid
    encode: Encode = viterbi.encode

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        return self.quantize_fitted(weight, target)

    def quantize_fitted(
        self,
        weight: Tensor,
        target: Tensor,
        *,
        previous: QuantizeStep | None = None,
        column_weight: Tensor | None = None,
    ) -> QuantizeStep:
        """See `FittingQuantizer`; the bound by the previous scales holds only approximately, because the codes are not
        always the best ones."""
        codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
        scales = target.new_empty(target.shape[0], self.grid.n_blocks(1, target.shape[1]))
        before = None if previous is None else blocks_of(previous).absmax.view(scales.shape)
        residual = torch.empty_like(weight) if previous is None else previous.residual
        table = self.grid.table(target.device)
        for rows in row_panels(target):
            start = None if before is None else before[rows]
            part = TrellisPanel(target[rows], self.grid, table, column_weight, self.encode)
            codes[rows], scales[rows] = part.fit(start)
            found = QuantizedBlocks(codes[rows], scales[rows].reshape(-1))
            torch.sub(weight[rows], trellis.dequantize(found, self.grid), out=residual[rows])
        return QuantizeStep(QuantizedBlocks(codes, scales.reshape(-1)), residual)

    def quantize_roughly(
        self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None, column_weight: Tensor | None = None
    ) -> QuantizeStep:
        return self.quantize_fitted(weight, target, previous=previous, column_weight=column_weight)

    def feed_back(
        self, weight: Tensor, product: Tensor, step: QuantizeStep, fed: Tensor, gains: FeedbackGains
    ) -> float:
        return feed_back(weight, product, step.residual, fed, gains)

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """Return W - Q, float32 [out, in]."""
        return weight - dequantize(quantized, self.grid)


@dataclass(frozen=True)
class TrellisPanel:
    """Whole tiles of rows of a target, [rows, in]."""

    target: Tensor
    grid: TrellisGrid
    table: Tensor
    column_weight: Tensor | None
    encode: Encode

    def fit(self, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return codes [rows, in] and scales [rows, blocks], alternating from earlier scales or from the blocks' root
        mean square, for which the table is made."""
        scales = self.start() if before is None else before
        for _ in range(_FIRST_FITS if before is None else 1):
            codes = self.assign(scales)
            scales = self.refit(codes, scales)
        return codes, scales

    def assign(self, scales: Tensor) -> Tensor:
        """Return codes uint8 [rows, in] for given scales [rows, blocks]."""
        columns = self.target.shape[1]
        x = self.target * spread(reciprocal(scales), self.grid, columns)
        # NaN and numbers that no state comes near would spoil sums of costs.
        x = x.nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
        gain = spread(scales.square(), self.grid, columns)
        gain = gain if self.column_weight is None else gain * self.column_weight
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for region in regions(*x.shape):
            weights = region.sequences(gain)
            weights = weights / weights.amax(dim=1, keepdim=True).clamp(min=1e-38)
            found = self.encode(region.sequences(x), weights.clamp_(min=_SMALLEST_GAIN), self.table, self.grid.bits)
            region.put(found, codes)
        return codes

    def refit(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the scales of least squared error for these codes: Σ w x c / Σ w c c; `scales` where there is none."""
        found = values(codes, self.grid, self.table)
        weighted = found if self.column_weight is None else found * self.column_weight
        above, below = (
            sum_blocks(row_blocks(weighted * other, self.grid)).view(scales.shape) for other in (self.target, found)
        )
        best = torch.where((above > 0) & (below > 0), above / below, scales)
        return round_to(best, self.grid.scale_dtype)

    def start(self) -> Tensor:
        """Return the root mean square of each block."""
        columns = self.target.shape[1]
        counts = row_blocks(torch.ones(1, columns, device=self.target.device), self.grid).sum(dim=1)
        unit = self.target.abs().amax().clamp(min=1e-38)  # squares of tiny numbers would vanish
        squares = sum_blocks(row_blocks((self.target / unit).square(), self.grid)).view(self.target.shape[0], -1)
        return round_to((squares / counts).sqrt() * unit, self.grid.scale_dtype)
