"""Block scales that minimise the block's squared error, instead of absmax.

For fixed codes with levels c the error Σ w (x - s c)² of a block is a parabola in its scale s. Its minimum is at
s = Σ w x c / Σ w c c and has the value Σ w x x - (Σ w x c)² / Σ w c c. For a fixed scale the nearest levels are best.
Fitting alternates the two (Lloyd's algorithm with one parameter), so it never raises the error and ends in a local
minimum; a first search therefore starts from several fractions of absmax and keeps the one with the lowest parabola.

At the end the scale is rounded to the container's dtype, and from then on errors are the true ones, computed from the
rounded products. Sums run in the order of the compiled kernel (`kernels.cpu.block_scales`), which computes the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks, midpoints, round_to, to_blocks

FRACTIONS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of absmax, from which a first search starts
SEARCH_REFITS = 3  # fits after the best start has been found
WARM_REFITS = 1  # fits from the scales of an earlier step
STEPS = 8  # elements that are added one after the other; these sums are then added in pairs

_TINY = 1e-38
_SAMPLE = 1 << 18  # elements that determine sixteen levels to a few thousandths
_PANEL = 1 << 22  # elements processed together on the CPU; more on a GPU
_PANEL_GPU = 1 << 26


def fit_scales(
    target: Tensor,
    grid: BlockGrid,
    levels: Tensor,
    *,
    previous: Tensor | None = None,
    column_weight: Tensor | None = None,
    guards: bool = True,
) -> Tensor:
    """Return scales float32 [n_blocks], holding values of the grid's scale dtype, that fit `target` block by block.

    Args:
        target: float32 [out, in].
        levels: float32 [2**bits], ascending.
        previous: scales to start from. No block's squared error exceeds that of these scales with the nearest codes.
            None searches from several fractions of absmax.
        column_weight: float32 [in], positive: the weight of a column's squared errors; None weights all equally.
        guards: False fits faster but less well: a search without further fits, or a fit from `previous` without the
            comparison that guarantees the bound above.
    """
    blocks = to_blocks(target, grid)
    weights = None if column_weight is None else to_blocks(column_weight.expand(target.shape), grid)
    panel = (_PANEL_GPU if target.is_cuda else _PANEL) // grid.block_size
    found = []
    for start in range(0, blocks.shape[0], panel):
        here = slice(start, start + panel)
        part = _Panel.of(blocks[here], grid, levels, None if weights is None else weights[here])
        found.append(part.search(guards) if previous is None else part.improve(previous[here], guards))
    return torch.cat(found)


def fit_levels(
    target: Tensor, quantized: QuantizedBlocks, grid: BlockGrid, column_weight: Tensor | None = None
) -> Tensor:
    """Return the levels that fit `target` best for these codes and scales: Σ w s x / Σ w s² over a level's elements.

    Large matrices are sampled evenly over their blocks. A level without elements is not changed.

    Returns:
        float32 [2**bits], ascending.
    """
    assert quantized.levels is not None, "only levels that belong to the matrix are fitted"
    stride = -(-target.numel() // _SAMPLE)
    x, codes, scales = (
        part[::stride] for part in (to_blocks(target, grid), to_blocks(quantized.codes, grid), quantized.absmax)
    )
    share = scales.double().unsqueeze(1).expand(x.shape)
    # The padding of short blocks is zero; its codes must not count.
    weight = torch.ones_like(target) if column_weight is None else column_weight.expand(target.shape)
    weighted = share * to_blocks(weight, grid)[::stride]
    size = quantized.levels.numel()
    # On a GPU `bincount` adds in no fixed order.
    above, below = (
        torch.stack([torch.where(codes == code, terms, 0).sum() for code in range(size)])
        for terms in (weighted * x, weighted * share)
    )
    fitted = torch.where(below > 0, above / below, quantized.levels.double())
    return fitted.float().sort().values


def starts(signed: bool) -> tuple[float, ...]:
    """Return the fractions of absmax from which a first search starts."""
    return (*FRACTIONS, *(-fraction for fraction in FRACTIONS)) if signed else FRACTIONS


def reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale with its sign; very large for a scale of zero."""
    return scale.abs().clamp(min=_TINY).reciprocal().copysign(scale)


@dataclass(frozen=True)
class _Fit:
    """Sums over each block for the nearest levels c: `xc` = Σ w x c, `cc` = Σ w c c."""

    xc: Tensor
    cc: Tensor

    def scale(self, fallback: Tensor, signed: bool) -> Tensor:
        """Return the parabola's minimum, or `fallback` if there is none or its sign is not allowed."""
        usable = (self.cc > 0) & ((self.xc != 0) if signed else (self.xc > 0))
        return torch.where(usable, self.xc / self.cc, fallback)

    def gain(self) -> Tensor:
        """Return the difference between Σ w x x and the parabola's minimum."""
        return torch.where(self.cc > 0, self.xc * self.xc / self.cc, 0.0)


@dataclass(frozen=True)
class _Panel:
    """Blocks in units of `unit`, the largest power of two up to their absmax: exact, and squares cannot overflow."""

    x: Tensor  # [n, block]
    absmax: Tensor  # [n]
    unit: Tensor  # [n]
    weights: Tensor | None  # [n, block]
    levels: Tensor
    grid: BlockGrid

    @classmethod
    def of(cls, blocks: Tensor, grid: BlockGrid, levels: Tensor, weights: Tensor | None) -> _Panel:
        absmax = blocks.abs().amax(dim=1)
        exponent = (absmax.view(torch.int32) & 0x7F800000).clamp(0x00800000, 0x7E800000)
        unit, inverse = exponent.view(torch.float32), (0x7F000000 - exponent).view(torch.float32)
        return cls(blocks * inverse.unsqueeze(1), absmax * inverse, unit, weights, levels, grid)

    def search(self, guards: bool) -> Tensor:
        """Return the fit from the best of several starts."""
        best, gain = self.absmax, torch.full_like(self.absmax, -1.0)
        for fraction in starts(self.grid.signed):
            start = self.absmax * torch.tensor(fraction, dtype=torch.float32)
            fit = self._fit(self._nearest(start))
            better = fit.gain() > gain
            gain = torch.where(better, fit.gain(), gain)
            best = torch.where(better, fit.scale(start, self.grid.signed), best)
        for _ in range(SEARCH_REFITS if guards else 0):
            best = self._refit(best)
        return self._stored(best)

    def improve(self, previous: Tensor, guards: bool) -> Tensor:
        """Return the fit from `previous`; with `guards`, blocks for which `previous` is better keep it."""
        start = previous / self.unit
        nearest = self._nearest(start)
        if not guards:
            return self._stored(self._fit(nearest).scale(start, self.grid.signed))
        error = self._error(nearest, previous)
        scale = self._fit(nearest).scale(start, self.grid.signed)
        for _ in range(WARM_REFITS - 1):
            scale = self._refit(scale)
        stored = self._stored(scale)
        return torch.where(self._error(self._nearest(stored / self.unit), stored) < error, stored, previous)

    def _refit(self, scale: Tensor) -> Tensor:
        return self._fit(self._nearest(scale)).scale(scale, self.grid.signed)

    def _stored(self, scale: Tensor) -> Tensor:
        return round_to(scale * self.unit, self.grid.scale_dtype)

    def _nearest(self, scale: Tensor) -> Tensor:
        """Return the level nearest to each element for this scale, [n, block]."""
        scaled = self.x * reciprocal(scale).unsqueeze(1)
        return self.levels[torch.bucketize(scaled, midpoints(self.levels), out_int32=True)]

    def _fit(self, nearest: Tensor) -> _Fit:
        weighted = nearest if self.weights is None else nearest * self.weights
        return _Fit(sum_blocks(weighted * self.x), sum_blocks(weighted * nearest))

    def _error(self, nearest: Tensor, stored: Tensor) -> Tensor:
        """Return the true squared error, with products rounded as the loader does."""
        values = round_to(nearest * stored.unsqueeze(1), self.grid.value_dtype) / self.unit.unsqueeze(1)
        squares = (self.x - values).square_()
        return sum_blocks(squares if self.weights is None else squares * self.weights)


def sum_blocks(terms: Tensor) -> Tensor:
    """Sum [n, block] -> [n], always in the same order; blocks have a power of two of elements, at least 8."""
    n_blocks = terms.shape[0]
    parts = terms.reshape(-1, STEPS)
    total = parts[:, 0]
    for step in range(1, STEPS):
        total = total + parts[:, step]
    while total.numel() > n_blocks:
        pairs = total.reshape(-1, 2)
        total = pairs[:, 0] + pairs[:, 1]
    return total
