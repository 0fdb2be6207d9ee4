"""Scales and zeros of integer groups, and the quantizer that LoftQ uses.

Three rules (`AffineGrid.scale_rule`):

* `absmax`: the range is ± the largest magnitude.
* `minmax`: the range is that of the group (asymmetric grids), or the largest magnitude is assigned the one code without
  a mirror image, with a scale of its sign (symmetric grids, as in GGUF's Q4_0).
* `mse`: the least squared error. The range is shrunk in steps; for the codes of each range the best scale and zero are
  a least-squares fit, which is rounded to the stored dtypes and evaluated with its own codes. The best candidate is
  refitted until that no longer helps. The min-max range is among the candidates, so no group is worse than with
  `minmax`.

Sums run over eight interleaved lanes in a fixed order, so that a compiled twin can compute the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loftq_cli.numerics.grids.affine import (
    Affine,
    AffineGrid,
    Part,
    QuantizedGroups,
    affine_of,
    assign,
    dequantize,
    parts,
    reciprocal,
    values,
)
from loftq_cli.numerics.grids.blocks import round_to
from loftq_cli.numerics.quantizers.protocols import QuantizeStep

LANES = 8
REFITS = 4  # alternations of codes and scale after the search; more would reduce the error by less than 0.1 %

# The smallest share of the min-max range that is tried. With few codes the best range excludes outliers.
_LEAST_SHARE = {2: 0.2, 3: 0.25, 4: 0.35, 8: 0.8}
_N_SHARES = {"float": 12, "integer": 8, "none": 8}  # more would reduce the error by less than 0.2 %


def shares(grid: AffineGrid) -> tuple[float, ...]:
    """Return the shrink factors of the search, from 1 down; exact in float32."""
    count, least = _N_SHARES[grid.zero], _LEAST_SHARE[grid.bits]
    exact = torch.linspace(1.0, least, count, dtype=torch.float64).float()
    return tuple(float(share) for share in exact)


@dataclass(frozen=True)
class AffineQuantizer:
    """The container's integer quantization in plain torch, on any device. A `protocols.Quantizer`."""

    grid: AffineGrid

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q by the grid's rule and compute W - Q. Both arguments float32 [out, in]."""
        return self._step(weight, quantize(target, self.grid))

    def quantize_fitted(self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None = None) -> QuantizeStep:
        """Quantize `target` with scales and zeros of least squared error, regardless of the grid's rule.

        Args:
            previous: an earlier step for this matrix, whose scales are the start: no group's error exceeds that of
                those scales with newly chosen codes. None searches.
        """
        start = None if previous is None else previous.quantized
        assert start is None or isinstance(start, QuantizedGroups)
        return self._step(weight, quantize(target, replace(self.grid, scale_rule="mse"), start=start))

    def _step(self, weight: Tensor, quantized: QuantizedGroups) -> QuantizeStep:
        return QuantizeStep(quantized, weight - dequantize(quantized, self.grid))


def quantize(x: Tensor, grid: AffineGrid, *, start: QuantizedGroups | None = None) -> QuantizedGroups:
    """Return codes, scales and zeros of x, float32 [out, in], by the grid's rule.

    Args:
        start: scales to refine instead of searching (rule `mse`).
    """
    groups = x.shape[0], grid.n_blocks(1, x.shape[1])
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(groups, dtype=torch.float32, device=x.device)
    zeros = None if grid.zero == "none" else torch.empty_like(scales)
    for part in parts(x, grid):
        piece = part.of(x)
        found = _choose(piece, grid, None if start is None else affine_of(start, grid, part))
        part.of(codes).copy_(assign(piece, found, grid))
        _store(part, found, grid, scales, zeros)
    return QuantizedGroups(codes, scales, zeros)


def _store(part: Part, found: Affine, grid: AffineGrid, scales: Tensor, zeros: Tensor | None) -> None:
    scales[part.rows, part.groups] = found.scale
    if zeros is not None:
        zeros[part.rows, part.groups] = found.offset if grid.zero == "float" else found.point


def _choose(x: Tensor, grid: AffineGrid, start: Affine | None) -> Affine:
    """Return scale, point and offset of groups x [rows, groups, width]."""
    if start is not None:
        return _refine(x, start, grid)
    low, high = x.amin(-1), x.amax(-1)
    if grid.scale_rule != "mse":
        return _spanning(low, high, grid, absolute=grid.scale_rule == "absmax")
    return _refine(x, _search(x, low, high, grid), grid)


def _spanning(low: Tensor, high: Tensor, grid: AffineGrid, *, absolute: bool) -> Affine:
    """Return the grid over a range or, with `absolute`, over ± its largest magnitude."""
    largest = torch.maximum(high, -low)
    none = torch.zeros_like(largest)
    if grid.zero == "none":
        half = 2 ** (grid.bits - 1)
        scale = largest / (half - 0.5) if absolute else torch.where(high > -low, -high, -low) / half
        return Affine(round_to(scale, grid.scale_dtype), torch.full_like(scale, half), none)
    if absolute:
        low, high = -largest, largest
    if grid.zero == "float":
        scale = round_to((high - low) / grid.top, grid.scale_dtype)
        return Affine(scale, none, round_to(low, grid.zero_dtype))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_to((high - low) / grid.top, grid.scale_dtype)
    return Affine(scale, _point(low, scale, grid), none)


def _point(low: Tensor, scale: Tensor, grid: AffineGrid) -> Tensor:
    """Return the zero point that places code 0 at `low`."""
    return (-low * reciprocal(scale)).round_().clamp_(grid.least_zero, grid.top)


def _search(x: Tensor, low: Tensor, high: Tensor, grid: AffineGrid) -> Affine:
    """Return the best of the min-max grid and the least-squares fits of all shrunk ranges."""
    best = _spanning(low, high, grid, absolute=False)
    least = _error(x, assign(x, best, grid), best, grid)
    for share in shares(grid):
        for candidate in _candidates(low * share, high * share, grid):
            fitted = _fit(x, assign(x, candidate, grid), candidate, grid)
            error = _error(x, assign(x, fitted, grid), fitted, grid)
            better = error < least
            best, least = fitted.where(better, best), torch.where(better, error, least)
    return best


def _candidates(low: Tensor, high: Tensor, grid: AffineGrid) -> list[Affine]:
    """Return the grids over a range: of both signs for a fixed zero, with the neighbouring points for a zero point."""
    middle = _spanning(low, high, grid, absolute=False)
    if grid.zero == "none":
        return [middle, replace(middle, scale=-middle.scale)]
    if grid.zero == "float":
        return [middle]
    points = [middle.point - 1, middle.point, middle.point + 1]
    return [replace(middle, point=point.clamp(grid.least_zero, grid.top)) for point in points]


def _refine(x: Tensor, start: Affine, grid: AffineGrid) -> Affine:
    """Alternate codes and least-squares fits from `start`, keeping for each group what lowers the error."""
    best = start
    codes = assign(x, best, grid)
    least = _error(x, codes, best, grid)
    for _ in range(REFITS):
        fitted = _fit(x, codes, best, grid)
        codes = assign(x, fitted, grid)
        error = _error(x, codes, fitted, grid)
        better = error < least
        best, least = fitted.where(better, best), torch.where(better, error, least)
    return best


def _error(x: Tensor, codes: Tensor, affine: Affine, grid: AffineGrid) -> Tensor:
    """Return the squared error of each group, with the loader's arithmetic."""
    return _lane_sum((x - values(codes, affine, grid)).square_())


def _fit(x: Tensor, codes: Tensor, start: Affine, grid: AffineGrid) -> Affine:
    """Return scale and zero of least squared error for given codes, rounded to the stored dtypes.

    If the codes do not determine them (all equal, or all at the zero), return `start`.
    """
    if grid.zero == "float":
        return _fit_line(x, codes, start, grid)
    point = start.point
    if grid.zero == "integer":
        point = _fitted_point(x, codes, start, grid)
    q = codes - point.unsqueeze(-1)
    squares = _lane_sum(q.square())
    scale = _lane_sum(q.mul_(x)) / squares.clamp(min=1)
    scale = torch.where(squares == 0, start.scale, round_to(scale, grid.scale_dtype))
    return Affine(scale, point, start.offset)


def _fitted_point(x: Tensor, codes: Tensor, start: Affine, grid: AffineGrid) -> Tensor:
    """Return the zero point nearest to that of the regression line."""
    slope, low = _line(x, codes)
    usable = slope > 0
    inverse = torch.where(usable, slope, 1.0).reciprocal()
    point = (-low * inverse).round_().clamp_(grid.least_zero, grid.top).float()
    return torch.where(usable, point, start.point)


def _fit_line(x: Tensor, codes: Tensor, start: Affine, grid: AffineGrid) -> Affine:
    slope, _ = _line(x, codes)
    scale = torch.where(slope > 0, round_to(slope.float(), grid.scale_dtype), start.scale)
    # The best offset for the rounded scale.
    offset = (_lane_sum(x).double() - scale.double() * _lane_sum(codes).double()) / x.shape[-1]
    return Affine(scale, start.point, round_to(offset.float(), grid.zero_dtype))


def _line(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept, float64, of the regression of x on codes; slope 0 if all codes are equal."""
    n = x.shape[-1]
    total, product = _lane_sum(x).double(), _lane_sum(x * codes).double()
    ones, squares = _lane_sum(codes).double(), _lane_sum(codes.square()).double()
    spread = n * squares - ones.square()
    slope = (n * product - ones * total) / spread.clamp(min=1)
    slope = torch.where(spread == 0, 0.0, slope)
    return slope, (total - slope * ones) / n


def _lane_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension in eight interleaved lanes, which are then added pairwise."""
    width = x.shape[-1]
    full = width // LANES * LANES
    lanes = x.new_zeros(*x.shape[:-1], LANES)
    for first in range(0, full, LANES):
        lanes += x[..., first : first + LANES]
    if full < width:
        lanes[..., : width - full] += x[..., full:]
    lanes = lanes[..., :4] + lanes[..., 4:]
    lanes = lanes[..., :2] + lanes[..., 2:]
    return lanes[..., 0] + lanes[..., 1]
