"""Integer groups, compiled by Triton: each program computes scales, zeros, codes and residual of some groups.

The arithmetic is that of `numerics.grids.affine` and `numerics.quantizers.integer` on a CPU, bit for bit: the same
candidates in the same order, the same eight lanes in every sum, and true division where torch on a GPU multiplies by a
reciprocal. A program reads its groups once for each candidate, eight columns at a time; all but the first read come
from a cache. The kernels must be launched without contraction to fused multiply-adds. Finite input only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loftq_cli.kernels.gpu.blocks import _bfloat16_bits, _rounded

ZERO_NONE, ZERO_INTEGER, ZERO_FLOAT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RULE_ABSMAX, RULE_MINMAX, RULE_MSE, RULE_REFINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LANES = tl.constexpr(8)

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2**23: adding it rounds to an integer, ties to even
_WIDE_ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 · 2**52, the same for float64


@triton.jit
def _read(weight, product, begin, size, i, corrects: tl.constexpr):
    """Return eight columns of the target [count, 8], zero beyond the groups, their positions, and which are inside."""
    j = i * LANES + tl.arange(0, LANES)[None, :]
    inside = j < size[:, None]
    places = begin[:, None] + j
    x = tl.load(product + places, mask=inside, other=0.0)
    if corrects:
        x = tl.load(weight + places, mask=inside, other=0.0) - x
    return x, places, inside


@triton.jit
def _add_lanes(lanes):
    """Sum [count, 8] -> [count], pairwise; a sum of two does not depend on their order."""
    count: tl.constexpr = lanes.shape[0]
    fours = tl.sum(tl.reshape(lanes, (count, 2, 4)), axis=1)
    return tl.sum(tl.sum(tl.reshape(fours, (count, 2, 2)), axis=1), axis=1)


@triton.jit
def _reciprocal(scale):
    """Return 1 / scale, or 0 where that would overflow."""
    return tl.where(tl.abs(scale) < 1e-37, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))


@triton.jit
def _assign(x, inverse, point, offset, top: tl.constexpr):
    """Return the nearest codes as float32; ties go to the even code."""
    shifted = (x - offset[:, None]) * inverse[:, None] + point[:, None]
    return (tl.minimum(tl.maximum(shifted, 0.0), top) + _ROUNDER) - _ROUNDER


@triton.jit
def _value(code, scale, point, offset, zero: tl.constexpr, product_kind: tl.constexpr, value_kind: tl.constexpr):
    """Return the values that the loader computes from codes."""
    value = _rounded((code - point[:, None]) * scale[:, None], product_kind)
    if zero == ZERO_FLOAT:
        value += offset[:, None]
    return _rounded(value, value_kind)


@triton.jit
def _from_range(
    low, high, top: tl.constexpr, least_zero: tl.constexpr,
    zero: tl.constexpr, absolute: tl.constexpr, scale_kind: tl.constexpr, offset_kind: tl.constexpr,
):  # fmt: skip
    """Return scale, point and offset over a range or, with `absolute`, over ± its largest magnitude."""
    largest = tl.maximum(high, -low)
    point, offset = tl.zeros_like(low), tl.zeros_like(low)
    if zero == ZERO_NONE:
        point += (top + 1.0) * 0.5
        if absolute:
            scale = _rounded(tl.div_rn(largest, point - 0.5), scale_kind)
        else:
            scale = _rounded(tl.div_rn(tl.where(high > -low, -high, -low), point), scale_kind)
    else:
        if absolute:
            low, high = -largest, largest
        if zero == ZERO_INTEGER:
            low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        scale = _rounded(tl.div_rn(high - low, tl.zeros_like(low) + top), scale_kind)
        if zero == ZERO_INTEGER:
            point = tl.minimum(tl.maximum(-low * _reciprocal(scale), least_zero), top)
            point = (point + _ROUNDER) - _ROUNDER
        else:
            offset = _rounded(low, offset_kind)
    return scale, point, offset


@triton.jit
def _moments(
    weight, product, begin, size, n_loops, scale, point, offset, origin, top: tl.constexpr, corrects: tl.constexpr
):
    """Return the lane sums [count] of q · x, of q² and of the codes, for q = code - origin and the codes that `scale`,
    `point` and `offset` determine."""
    count: tl.constexpr = size.shape[0]
    inverse = _reciprocal(scale)
    products, squares = tl.zeros((count, LANES), tl.float32), tl.zeros((count, LANES), tl.float32)
    ones = tl.zeros((count, LANES), tl.float32)
    for i in range(n_loops):
        x, _places, inside = _read(weight, product, begin, size, i, corrects)
        code = _assign(x, inverse, point, offset, top)
        q = tl.where(inside, code - origin[:, None], 0.0)
        products += q * x
        squares += q * q
        ones += tl.where(inside, code, 0.0)
    return _add_lanes(products), _add_lanes(squares), _add_lanes(ones)


@triton.jit
def _fit(
    weight, product, begin, size, n_loops, total, of_scale, of_point, of_offset, scale, point, offset,
    top: tl.constexpr, least_zero: tl.constexpr, zero: tl.constexpr, scale_kind: tl.constexpr,
    offset_kind: tl.constexpr, corrects: tl.constexpr,
):  # fmt: skip
    """Return scale, point and offset of least squared error for the codes that the `of_` arguments determine.

    If the codes do not determine them, return `scale`, `point` and `offset`.
    """
    origin = tl.zeros_like(scale)
    if zero == ZERO_NONE:
        origin = point
    xq, qq, ones = _moments(weight, product, begin, size, n_loops, of_scale, of_point, of_offset, origin, top, corrects)
    if zero != ZERO_NONE:
        n, wide_total, wide_ones = tl.maximum(size, 1).to(tl.float64), total.to(tl.float64), ones.to(tl.float64)
        spread = n * qq.to(tl.float64) - wide_ones * wide_ones
        slope = (n * xq.to(tl.float64) - wide_ones * wide_total) / tl.maximum(spread, 1.0)
        slope = tl.where(spread == 0.0, 0.0, slope)
    if zero == ZERO_FLOAT:
        fitted = tl.where(slope > 0.0, _rounded(slope.to(tl.float32), scale_kind), scale)
        # The best offset for the rounded scale.
        offset = _rounded(((wide_total - fitted.to(tl.float64) * wide_ones) / n).to(tl.float32), offset_kind)
    else:
        fitted_point = point
        if zero == ZERO_INTEGER:
            low = (wide_total - slope * wide_ones) / n
            best = -low * (1.0 / tl.where(slope > 0.0, slope, 1.0))
            best = tl.minimum(tl.maximum(best, least_zero), top)
            best = (best + _WIDE_ROUNDER) - _WIDE_ROUNDER
            fitted_point = tl.where(slope > 0.0, best.to(tl.float32), point)
            xq, qq, ones = _moments(
                weight, product, begin, size, n_loops, of_scale, of_point, of_offset, fitted_point, top, corrects
            )
        fitted = tl.where(qq == 0.0, scale, _rounded(tl.div_rn(xq, tl.maximum(qq, 1.0)), scale_kind))
        point = fitted_point
    return fitted, point, offset


@triton.jit
def _evaluate(
    weight, product, begin, size, n_loops, scale, point, offset, top: tl.constexpr,
    zero: tl.constexpr, product_kind: tl.constexpr, value_kind: tl.constexpr, corrects: tl.constexpr,
):  # fmt: skip
    """Return the squared error [count], with the loader's arithmetic."""
    count: tl.constexpr = size.shape[0]
    lanes = tl.zeros((count, LANES), tl.float32)
    inverse = _reciprocal(scale)
    for i in range(n_loops):
        x, _places, inside = _read(weight, product, begin, size, i, corrects)
        code = _assign(x, inverse, point, offset, top)
        distance = tl.where(inside, x - _value(code, scale, point, offset, zero, product_kind, value_kind), 0.0)
        lanes += distance * distance
    return _add_lanes(lanes)


@triton.jit
def _range(weight, product, begin, size, n_loops, corrects: tl.constexpr):
    """Return the minimum, the maximum and the lane sum of each group, [count] each; 0 for groups that do not exist."""
    count: tl.constexpr = size.shape[0]
    low = tl.full((count, LANES), float("inf"), tl.float32)
    high, total = -low, tl.zeros((count, LANES), tl.float32)
    for i in range(n_loops):
        x, _places, inside = _read(weight, product, begin, size, i, corrects)
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
        total += x
    exists = size > 0
    least, largest = tl.min(low, axis=1), tl.max(high, axis=1)
    return tl.where(exists, least, 0.0), tl.where(exists, largest, 0.0), _add_lanes(total)


@triton.jit
def _started(scales, zeros, g, exists, middle: tl.constexpr, zero: tl.constexpr):
    """Return the scale, point and offset that an earlier step stored."""
    scale = tl.load(scales + g, mask=exists, other=0.0)
    point, offset = tl.zeros_like(scale), tl.zeros_like(scale)
    if zero == ZERO_NONE:
        point += middle
    elif zero == ZERO_INTEGER:
        point = tl.load(zeros + g, mask=exists, other=0.0)
    else:
        offset = tl.load(zeros + g, mask=exists, other=0.0)
    return scale, point, offset


@triton.jit
def _search(
    weight, product, begin, size, n_loops, low, high, total, scale, point, offset, shares, n_shares, n_refits,
    top: tl.constexpr, least_zero: tl.constexpr, zero: tl.constexpr, searches: tl.constexpr, scale_kind: tl.constexpr,
    offset_kind: tl.constexpr, product_kind: tl.constexpr, value_kind: tl.constexpr, corrects: tl.constexpr,
):  # fmt: skip
    """Return the best of the given grid, with `searches` the fits of all shrunk ranges, and refits of the best."""
    least = _evaluate(
        weight, product, begin, size, n_loops, scale, point, offset, top, zero, product_kind, value_kind, corrects
    )
    variants: tl.constexpr = 2 if zero == ZERO_NONE else 3 if zero == ZERO_INTEGER else 1
    n_tried = n_shares * variants if searches else 0
    new_scale, new_point, new_offset = scale, point, offset
    for step in range(n_tried + n_refits):
        from_scale, from_point, from_offset = scale, point, offset
        if searches:
            share, variant = tl.load(shares + tl.minimum(step, n_tried - 1) // variants), step % variants
            tried_scale, tried_point, tried_offset = _from_range(
                low * share, high * share, top, least_zero, zero, False, scale_kind, offset_kind
            )
            if zero == ZERO_NONE:
                tried_scale = tl.where(variant == 1, -tried_scale, tried_scale)
            elif zero == ZERO_INTEGER:
                tried_point = tl.minimum(tl.maximum(tried_point + (variant - 1), least_zero), top)
            from_scale = tl.where(step < n_tried, tried_scale, scale)
            from_point = tl.where(step < n_tried, tried_point, point)
            from_offset = tl.where(step < n_tried, tried_offset, offset)
        # A refit uses the codes of the fit before, even if that was not better.
        new_scale = tl.where(step <= n_tried, from_scale, new_scale)
        new_point = tl.where(step <= n_tried, from_point, new_point)
        new_offset = tl.where(step <= n_tried, from_offset, new_offset)
        new_scale, new_point, new_offset = _fit(
            weight, product, begin, size, n_loops, total, new_scale, new_point, new_offset,
            from_scale, from_point, from_offset, top, least_zero, zero, scale_kind, offset_kind, corrects,
        )  # fmt: skip
        error = _evaluate(
            weight, product, begin, size, n_loops, new_scale, new_point, new_offset, top,
            zero, product_kind, value_kind, corrects,
        )  # fmt: skip
        better = error < least
        scale, point = tl.where(better, new_scale, scale), tl.where(better, new_point, point)
        offset, least = tl.where(better, new_offset, offset), tl.where(better, error, least)
    return scale, point, offset


@triton.jit
def _write(
    weight, product, codes, residual, begin, size, n_loops, scale, point, offset,
    top: tl.constexpr, zero: tl.constexpr, product_kind: tl.constexpr, value_kind: tl.constexpr,
    corrects: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Store codes and residual; return the residual's squared norm."""
    inverse = _reciprocal(scale)
    squares = tl.zeros((size.shape[0], LANES), tl.float64)
    for i in range(n_loops):
        x, places, inside = _read(weight, product, begin, size, i, corrects)
        code = _assign(x, inverse, point, offset, top)
        tl.store(codes + places, code.to(tl.uint8), mask=inside)
        difference = tl.load(weight + places, mask=inside, other=0.0) - _value(
            code, scale, point, offset, zero, product_kind, value_kind
        )
        wide = tl.where(inside, difference, 0.0).to(tl.float64)
        squares += wide * wide
        if halves:
            tl.store(residual + places, (_bfloat16_bits(difference) >> 16).to(tl.int16), mask=inside)
        else:
            tl.store(residual + places, difference, mask=inside)
    return tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def quantize_groups(
    weight, product, codes, scales, zeros, residual, sums, shares,
    n_groups, n_in, groups_per_row, group_width, n_shares, n_refits, top: tl.constexpr, least_zero: tl.constexpr,
    count: tl.constexpr, zero: tl.constexpr, rule: tl.constexpr, scale_kind: tl.constexpr, offset_kind: tl.constexpr,
    product_kind: tl.constexpr, value_kind: tl.constexpr, corrects: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Quantize `count` groups of the target: `product`, or weight - product with `corrects`.

    Args:
        weight, product: float32 [out, in].
        codes: uint8 [out, in], output.
        scales, zeros: float32 [out, groups], output, and with RULE_REFINE also the start. `zeros` is unused if the grid
            has none.
        residual: float32 [out, in], output; with `halves` int16, which takes bfloat16 bits. It must not share memory
            with another array.
        sums: float64 [programs], output: the residual's squared norm.
        scale_kind, offset_kind, product_kind, value_kind: the dtypes to which these numbers are rounded.
    """
    g = tl.program_id(0) * count + tl.arange(0, count)
    exists = g < n_groups
    row = g // groups_per_row
    column = (g - row * groups_per_row) * group_width
    size = tl.where(exists, tl.minimum(group_width, n_in - column), 0)
    begin = row.to(tl.int64) * n_in + column
    n_loops = (group_width + LANES - 1) // LANES
    low, high, total = _range(weight, product, begin, size, n_loops, corrects)
    if rule == RULE_REFINE:
        scale, point, offset = _started(scales, zeros, g, exists, (top + 1.0) * 0.5, zero)
    else:
        scale, point, offset = _from_range(
            low, high, top, least_zero, zero, rule == RULE_ABSMAX, scale_kind, offset_kind
        )
    if rule >= RULE_MSE:
        scale, point, offset = _search(
            weight, product, begin, size, n_loops, low, high, total, scale, point, offset, shares, n_shares, n_refits,
            top, least_zero, zero, rule == RULE_MSE, scale_kind, offset_kind, product_kind, value_kind, corrects,
        )  # fmt: skip
    tl.store(scales + g, scale, mask=exists)
    if zero == ZERO_INTEGER:
        tl.store(zeros + g, point, mask=exists)
    elif zero == ZERO_FLOAT:
        tl.store(zeros + g, offset, mask=exists)
    square = _write(
        weight, product, codes, residual, begin, size, n_loops, scale, point, offset,
        top, zero, product_kind, value_kind, corrects, halves,
    )  # fmt: skip
    tl.store(sums + tl.program_id(0), square)
