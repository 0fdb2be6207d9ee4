"""Integer groups in one pass over memory, compiled by numba: scales, zeros, codes and residual of a range of rows.

The arithmetic is that of `numerics.grids.affine` and `numerics.quantizers.integer`, bit for bit: the same candidates in
the same order, the same eight lanes in every sum. Finite input only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loftq_cli.kernels.cpu.blocks import _inline, _kernel, _round, _subtract

ZERO_NONE, ZERO_INTEGER, ZERO_FLOAT = range(3)
RULE_ABSMAX, RULE_MINMAX, RULE_MSE, RULE_REFINE = range(4)

_F32, _F64 = np.float32, np.float64
_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST = np.float32(1e-37)
_ROUNDER = np.float32(12582912.0)  # 1.5 · 2**23: adding it rounds to an integer, ties to even


@_inline
def _assign(x: Any, scale: Any, point: Any, offset: Any, top: Any, code: Any) -> None:
    inverse = _ONE / scale if abs(scale) >= _SMALLEST else _ZERO
    for j in range(x.size):
        shifted = min(max((x[j] - offset) * inverse + point, _ZERO), top)
        code[j] = (shifted + _ROUNDER) - _ROUNDER


@_inline
def _multiply(code: Any, point: Any, scale: Any, value: Any) -> None:
    for j in range(code.size):
        value[j] = (code[j] - point) * scale


@_inline
def _add(value: Any, offset: Any) -> None:
    for j in range(value.size):
        value[j] += offset


@_inline
def _add_lanes(lanes: Any) -> Any:
    first, second = (lanes[0] + lanes[4]) + (lanes[2] + lanes[6]), (lanes[1] + lanes[5]) + (lanes[3] + lanes[7])
    return first + second


@_inline
def _squared_distance(x: Any, value: Any, lanes: Any) -> Any:
    lanes[:] = _ZERO
    full = x.size // 8 * 8
    for first in range(0, full, 8):
        for k in range(8):
            distance = x[first + k] - value[first + k]
            lanes[k] += distance * distance
    for k in range(x.size - full):
        distance = x[full + k] - value[full + k]
        lanes[k] += distance * distance
    return _add_lanes(lanes)


@_inline
def _products(x: Any, code: Any, point: Any, lanes: Any, squares: Any) -> None:
    """Compute the lanes of the sums of (code - point) · x and of (code - point)²."""
    lanes[:], squares[:] = _ZERO, _ZERO
    full = x.size // 8 * 8
    for first in range(0, full, 8):
        for k in range(8):
            q = code[first + k] - point
            lanes[k] += q * x[first + k]
            squares[k] += q * q
    for k in range(x.size - full):
        q = code[full + k] - point
        lanes[k] += q * x[full + k]
        squares[k] += q * q


@_inline
def _totals(code: Any, lanes: Any) -> Any:
    lanes[:] = _ZERO
    full = code.size // 8 * 8
    for first in range(0, full, 8):
        for k in range(8):
            lanes[k] += code[first + k]
    for k in range(code.size - full):
        lanes[k] += code[full + k]
    return _add_lanes(lanes)


@_inline
def _rounded(value: Any, box: Any, box_bits: Any, kind: int) -> Any:
    box[0] = value
    _round(box, box_bits, kind)
    return box[0]


@_inline
def _rounded_point(value: Any, least_zero: Any, top: Any) -> Any:
    return min(max(np.rint(value), least_zero), top)


class Arrays(NamedTuple):
    """The arrays of one call, float32 unless said otherwise.

    Attributes:
        weight, product, residual: [out, in]; `product` may share memory with `residual`, which is an output.
        codes: uint8 [out, in], output.
        scales, zeros: [out, groups], output, and with RULE_REFINE also the start. `zeros` is empty for ZERO_NONE.
        sums: float64 [out], output: the residual's squared norm by row.
        shares: factors of a group's range that RULE_MSE tries.
    """

    weight: Any
    product: Any
    codes: Any
    scales: Any
    zeros: Any
    residual: Any
    sums: Any
    shares: Any


class Settings(NamedTuple):
    """The grid and the rule of one call.

    Attributes:
        width: number of elements in a full group.
        top: the largest code, float32.
        zero: one of ZERO_NONE, ZERO_INTEGER, ZERO_FLOAT.
        least_zero: the smallest zero point, float32.
        rule: one of RULE_ABSMAX, RULE_MINMAX, RULE_MSE, RULE_REFINE.
        refits: number of least-squares fits after the search.
        scale_kind, offset_kind, product_kind, value_kind: the dtypes to which these numbers are rounded.
        corrects: True if the target is weight - product, False if it is `product`.
    """

    width: int
    top: Any
    zero: int
    least_zero: Any
    rule: int
    refits: int
    scale_kind: int
    offset_kind: int
    product_kind: int
    value_kind: int
    corrects: bool


@_kernel
def quantize_rows(arrays: Any, settings: Any, first: int, last: int) -> None:
    """Quantize rows `first`..`last` of `arrays` (`Arrays`) as `settings` (`Settings`) say.

    One long function on purpose: cutting its body into functions, inlined by numba or by LLVM, costs 8 to 127 %.
    """
    weight, product, codes, scales, zeros, residual, sums, shares = arrays
    width, top, zero, least_zero, rule, refits, scale_kind, offset_kind, product_kind, value_kind, corrects = settings
    middle = _F32((top + _ONE) / _F32(2))
    n_in = weight.shape[1]
    x, code, value = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    value_bits = value.view(np.int32)
    lanes, squares, box = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(1, np.float32)
    box_bits = box.view(np.int32)
    variants = 1 if zero == ZERO_FLOAT else 2 if zero == ZERO_NONE else 3
    tried = shares.size * variants if rule == RULE_MSE else 0
    steps = 1 + tried + (refits if rule >= RULE_MSE else 0)
    for row in range(first, last):
        row_sum = 0.0
        for group in range(scales.shape[1]):
            begin, end = group * width, min((group + 1) * width, n_in)
            n = end - begin
            xs, cs, vs, vbits = x[:n], code[:n], value[:n], value_bits[:n]
            if corrects:
                _subtract(weight[row, begin:end], product[row, begin:end], xs)
            else:
                xs[:] = product[row, begin:end]
            low, high = xs[0], xs[0]
            for j in range(n):
                low, high = min(low, xs[j]), max(high, xs[j])
            total = _totals(xs, lanes)
            best_scale, best_point, best_offset, least = _ZERO, _ZERO, _ZERO, _ZERO
            for step in range(steps):
                fits = step > 0
                if step == 0 and rule == RULE_REFINE:
                    scale = scales[row, group]
                    point = middle if zero == ZERO_NONE else zeros[row, group] if zero == ZERO_INTEGER else _ZERO
                    offset = zeros[row, group] if zero == ZERO_FLOAT else _ZERO
                elif step <= tried:
                    share = _ONE if step == 0 else shares[(step - 1) // variants]
                    lower, upper = low * share, high * share
                    largest = max(upper, -lower)
                    point, offset = _ZERO, _ZERO
                    if zero == ZERO_NONE:
                        point = middle
                        if rule == RULE_ABSMAX:
                            scale = largest / (middle - _F32(0.5))
                        else:
                            scale = (-upper if upper > -lower else -lower) / middle
                        scale = _rounded(scale, box, box_bits, scale_kind)
                        if fits and (step - 1) % variants == 1:
                            scale = -scale
                    else:
                        if rule == RULE_ABSMAX:
                            lower, upper = -largest, largest
                        if zero == ZERO_INTEGER:
                            lower, upper = min(lower, _ZERO), max(upper, _ZERO)
                        scale = _rounded((upper - lower) / top, box, box_bits, scale_kind)
                        if zero == ZERO_INTEGER:
                            inverse = _ONE / scale if abs(scale) >= _SMALLEST else _ZERO
                            point = _rounded_point(-lower * inverse, least_zero, top)
                            if fits:
                                shift = _F32((step - 1) % variants - 1)
                                point = min(max(point + shift, least_zero), top)
                        else:
                            offset = _rounded(lower, box, box_bits, offset_kind)
                else:
                    scale, point, offset = best_scale, best_point, best_offset
                if 0 < step <= tried or step == tried + 1:
                    _assign(xs, scale, point, offset, top, cs)
                if fits:
                    if zero != ZERO_NONE:
                        _products(xs, cs, _ZERO, lanes, squares)
                        wide_product, wide_squares = _F64(_add_lanes(lanes)), _F64(_add_lanes(squares))
                        wide_total, ones = _F64(total), _F64(_totals(cs, lanes))
                        spread = _F64(n) * wide_squares - ones * ones
                        slope = (_F64(n) * wide_product - ones * wide_total) / max(spread, 1.0)
                        if spread == 0.0:
                            slope = _F64(0)
                    if zero == ZERO_FLOAT:
                        if slope > 0.0:
                            scale = _rounded(_F32(slope), box, box_bits, scale_kind)
                        offset = _F32((wide_total - _F64(scale) * ones) / _F64(n))
                        offset = _rounded(offset, box, box_bits, offset_kind)
                    else:
                        if zero == ZERO_INTEGER and slope > 0.0:
                            intercept = (wide_total - slope * ones) / _F64(n)
                            point = _F32(_rounded_point(-intercept * (1.0 / slope), _F64(least_zero), _F64(top)))
                        _products(xs, cs, point, lanes, squares)
                        square = _add_lanes(squares)
                        if square != _ZERO:
                            scale = _rounded(_add_lanes(lanes) / max(square, _ONE), box, box_bits, scale_kind)
                _assign(xs, scale, point, offset, top, cs)
                if rule < RULE_MSE:
                    best_scale, best_point, best_offset = scale, point, offset
                else:
                    _multiply(cs, point, scale, vs)
                    _round(vs, vbits, product_kind)
                    if zero == ZERO_FLOAT:
                        _add(vs, offset)
                    _round(vs, vbits, value_kind)
                    error = _squared_distance(xs, vs, lanes)
                    if step == 0 or error < least:
                        best_scale, best_point, best_offset, least = scale, point, offset, error
            _assign(xs, best_scale, best_point, best_offset, top, cs)
            _multiply(cs, best_point, best_scale, vs)
            _round(vs, vbits, product_kind)
            if zero == ZERO_FLOAT:
                _add(vs, best_offset)
            _round(vs, vbits, value_kind)
            scales[row, group] = best_scale
            if zero != ZERO_NONE:
                zeros[row, group] = best_offset if zero == ZERO_FLOAT else best_point
            for j in range(n):
                codes[row, begin + j] = np.uint8(cs[j])
            _subtract(weight[row, begin:end], vs, residual[row, begin:end])
            for j in range(begin, end):
                wide = _F64(residual[row, j])
                row_sum += wide * wide
        sums[row] = row_sum
