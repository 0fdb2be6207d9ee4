"""LoftQ on a stack of matrices of one shape, as single small matrices would leave a GPU waiting for work.

Quantization treats the stack as one tall matrix; the low-rank step is that of `numerics.lowrank`, with batched products
and decompositions. Only the usual path is implemented: matrices that need another (float64, Householder QR, rescaling)
are flagged on the device and left to `numerics.methods.loftq.loftq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loftq_cli.numerics.grids.affine import QuantizedGroups
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.grids.grid import Grid, Quantized
from loftq_cli.numerics.lowrank.stacked import LowRanks, in_range, low_ranks, norms_of, refine_stack
from loftq_cli.numerics.lowrank.truncate import half_is_faster
from loftq_cli.numerics.methods.loftq import CANCELLING, ROUNDING_SHOWS, LoftQResult
from loftq_cli.numerics.quantizers.protocols import FusedQuantizer, Quantizer


def may_stack(grid: Grid, out_features: int, in_features: int) -> bool:
    """True if quantizing stacked matrices [out, in] is the same as quantizing each of them alone.

    That requires that no block contains elements of two matrices, and that nothing is fitted to, or scaled by, a whole
    matrix.
    """
    if not isinstance(grid, BlockGrid):
        return True  # groups stay within rows
    if grid.nested or grid.codebook.fitted:
        return False
    return grid.layout == "rows" or out_features * in_features % grid.block_size == 0


def stacked_loftq(
    weights: Tensor, quantizer: Quantizer, *, rank: int, iters: int, seeds: Sequence[int], keep_last: bool = False
) -> list[LoftQResult | None]:
    """Run `loftq` with its fast step on every matrix of a stack; results agree up to the last bits of sums.

    The host waits for the device once before the steps, once per step (and when eigenvectors are checked), and once
    after them, whatever the number of matrices.

    Args:
        weights: float32 [b, out, in], on a grid with `may_stack`.
        rank: r >= 1.
        iters: T >= 1.
        seeds: one for each matrix's CPU generator, which makes the same draws as for `fast_step`.

    Returns:
        A result for each matrix, or None if it must be passed to `loftq`: its spectrum is too wide for float32 or
        bfloat16, columns vanish, hardly anything remains, or numbers (zero, NaN, infinity) need special treatment.
    """
    assert rank >= 1 and iters >= 1 and len(seeds) == len(weights), "one seed per matrix, and at least one step"
    stack = _Stack(weights, quantizer, min(rank, *weights.shape[1:]), tuple(seeds))
    try:
        return stack.run(iters, keep_last)
    except torch.linalg.LinAlgError:  # one of them failed, but the error does not identify it
        return [None] * len(weights)


@dataclass(frozen=True)
class _Step:
    """Codes and scales of the whole stack, W - Q float32 [b, out, in], and ‖W - Q‖_F float64 [b]."""

    quantized: Quantized
    residuals: Tensor
    norms: Tensor


@dataclass(frozen=True)
class _Kept:
    """The best step of each matrix.

    Attributes:
        number: its number from 1, int64 [b].
        total: ‖W - Q‖_F, float64 [b].
        left: ‖W - Q - BA‖_F, float64 [b].
        quantized: codes and scales of the stack.
        found: its factors.
    """

    number: Tensor
    total: Tensor
    left: Tensor
    quantized: Quantized
    found: LowRanks

    def where(self, mask: Tensor, other: _Kept) -> _Kept:
        """Return the steps of `self` where `mask` [b] is true and those of `other` elsewhere."""
        return _Kept(
            torch.where(mask, self.number, other.number),
            torch.where(mask, self.total, other.total),
            torch.where(mask, self.left, other.left),
            _choose(mask, self.quantized, other.quantized),
            self.found.where(mask, other.found),
        )


@dataclass(frozen=True)
class _Stack:
    """A stack of matrices to run Algorithm 1 on."""

    weights: Tensor
    quantizer: Quantizer
    rank: int
    seeds: tuple[int, ...]

    @property
    def half(self) -> bool:
        """True if BA is multiplied, and residuals are rounded, in bfloat16."""
        return isinstance(self.quantizer, FusedQuantizer) and half_is_faster(self.weights[0])

    def run(self, iters: int, keep_last: bool) -> list[LoftQResult | None]:
        """Do what `stacked_loftq` does, but raise LinAlgError if an eigenvalue solver fails."""
        norms = plain = norms_of(self.weights)
        sound, lefts = in_range(norms), list[Tensor]()
        found: LowRanks | None = None
        kept: _Kept | None = None
        if not bool(torch.isfinite(norms).all()):  # compiled quantizers need finite input
            return [None] * len(self.seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        for t in range(1, iters + 1):
            step = self._quantize(found, kept)
            plain = step.norms if t == 1 else plain
            ranks = low_ranks(
                step.residuals, step.norms, self.rank, previous=found, generators=generators, half=self.half
            )
            squares = step.norms.square() - ranks.ranks.energies
            sound = sound & ranks.sound & (squares > CANCELLING * step.norms.square())
            if not bool(sound.any()):
                return [None] * len(self.seeds)
            found = ranks.ranks.where(sound)  # NaN would propagate to the next target
            lefts.append(squares.clamp(min=0).sqrt())
            number = torch.full_like(sound, t, dtype=torch.int64)
            now = _Kept(number, step.norms, lefts[-1], step.quantized, found)
            better = torch.full_like(sound, True) if kept is None or keep_last else lefts[-1] < kept.left
            kept = now if kept is None else now.where(better, kept)
        assert kept is not None, "there is at least one step"
        if self.half:
            kept, sound = self._make_exact(kept, sound)
        return self._results(kept, sound, norms, plain, lefts)

    def _quantize(self, found: LowRanks | None, kept: _Kept | None) -> _Step:
        """Quantize W - BA, with the stack as one matrix [b * out, in]."""
        tall = self.weights.flatten(0, 1)
        target = tall
        if found is not None and kept is not None:
            # Quantizers of groups need BA in float32.
            rounds = self.half and isinstance(kept.quantized, QuantizedBlocks)
            product = found.product(torch.bfloat16 if rounds else torch.float32)
            target = (self.weights - product.float()).flatten(0, 1)
        step = self.quantizer.quantize_residual(tall, target)
        residuals = step.residual.view_as(self.weights)
        return _Step(step.quantized, residuals, norms_of(residuals))

    def _make_exact(self, kept: _Kept, sound: Tensor) -> tuple[_Kept, Tensor]:
        """Replace factors by the exact projection if they capture so much of rounded residuals that rounding shows."""
        shows = kept.found.energies > ROUNDING_SHOWS * kept.total.square()
        if not bool((shows & sound).any()):
            return kept, sound
        assert isinstance(self.quantizer, FusedQuantizer), "only fused quantizers use bfloat16"
        residuals = self.quantizer.restore(self.weights.flatten(0, 1), kept.quantized).view_as(self.weights)
        found, total = refine_stack(residuals, kept.found), norms_of(residuals).square()
        squares = total - found.ranks.energies
        exact = replace(kept, left=squares.clamp(min=0).sqrt(), found=found.ranks)
        return exact.where(shows, kept), sound & (~shows | (found.sound & (squares > CANCELLING * total)))

    def _results(
        self, kept: _Kept, sound: Tensor, norms: Tensor, plain: Tensor, lefts: Sequence[Tensor]
    ) -> list[LoftQResult | None]:
        """Return one result per matrix; all numbers are copied to the host at once."""
        rows = torch.stack([sound.double(), kept.number.double(), plain / norms, kept.left / norms]).T.tolist()
        residuals = (torch.stack(list(lefts)) / norms).T.tolist()
        lora_a, lora_b = kept.found.lora_a, kept.found.lora_b
        parts = _split(kept.quantized, len(norms))
        results: list[LoftQResult | None] = []
        for (is_sound, number, plain_residual, left), steps, a, b, part in zip(rows, residuals, lora_a, lora_b, parts):
            steps[int(number) - 1] = left
            found = LoftQResult(part, a, b, plain_residual, tuple(steps), int(number))
            results.append(found if is_sound else None)
        return results


def _choose(mask: Tensor, these: Quantized, others: Quantized) -> Quantized:
    """Return, for each matrix, the codes and scales of `these` where `mask` [b] is true, else those of `others`."""

    def choose(one: Tensor, other: Tensor) -> Tensor:
        pieces = one.view(len(mask), -1), other.view(len(mask), -1)
        return torch.where(mask.unsqueeze(1), *pieces).view_as(one)

    if isinstance(these, QuantizedBlocks):
        assert isinstance(others, QuantizedBlocks), "both must have the same grid"
        return QuantizedBlocks(choose(these.codes, others.codes), choose(these.absmax, others.absmax))
    assert isinstance(others, QuantizedGroups), "both must have the same grid"
    zeros = None if these.zeros is None or others.zeros is None else choose(these.zeros, others.zeros)
    return QuantizedGroups(choose(these.codes, others.codes), choose(these.scales, others.scales), zeros)


def _split(quantized: Quantized, count: int) -> list[Quantized]:
    """Return the codes and scales of each matrix of a stack, as views."""
    codes = quantized.codes.chunk(count)
    if isinstance(quantized, QuantizedBlocks):
        return [QuantizedBlocks(*pair) for pair in zip(codes, quantized.absmax.chunk(count))]
    zeros = [None] * count if quantized.zeros is None else quantized.zeros.chunk(count)
    return [QuantizedGroups(*parts) for parts in zip(codes, quantized.scales.chunk(count), zeros)]
