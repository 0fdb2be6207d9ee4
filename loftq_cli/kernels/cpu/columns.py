"""Runs of columns with error feedback, compiled by numba: codes, values and the later targets of a range of rows.

The arithmetic is that of `numerics.quantizers.columns.quantize_by_tiles` with the plain sweeps, bit for bit: each error
times its share is a product and then a sum, column after column. Rows are independent. Finite input only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from loftq_cli.kernels.cpu.blocks import _inline, _kernel, _round

_F32 = np.float32
_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST_SCALE, _TINY = np.float32(1e-37), np.float32(1e-38)
_ROUNDER = np.float32(12582912.0)  # 1.5 · 2**23: adding it rounds to an integer, ties to even
_COMPARED = 16  # levels up to which comparing with all of them is faster than a search


class Run(NamedTuple):
    """The arrays of one run of columns.

    Attributes:
        weight: float32 [out, width], what the values stand for.
        target: float32 [out, width]; the errors of the run's own columns are added.
        values: float32 [out, width], output.
        codes: uint8 [out, width], output.
        feedback: float32 [width, width].
    """

    weight: Any
    target: Any
    values: Any
    codes: Any
    feedback: Any


@_inline
def _feed(target: Any, share: Any, error: Any) -> None:
    for k in range(target.size):
        target[k] += error * share[k]


@_kernel
def quantize_with_levels(
    run: Any, scales: Any, middles: Any, levels: Any, value_kind: int, first: int, last: int
) -> None:
    """Quantize rows `first`..`last` with a codebook; `scales` float32 [out]."""
    weight, target, values, codes, feedback = run
    width = weight.shape[1]
    table = np.empty(levels.size, np.float32)
    bits = table.view(np.int32)
    for row in range(first, last):
        scale = scales[row]
        inverse = np.copysign(_ONE / max(abs(scale), _TINY), scale)
        for k in range(levels.size):
            table[k] = levels[k] * scale
        _round(table, bits, value_kind)
        x, t, value, code = weight[row], target[row], values[row], codes[row]
        for j in range(width):
            z = t[j] * inverse
            found = 0
            if levels.size <= _COMPARED:
                for k in range(middles.size):
                    found += z > middles[k]
            else:
                half = (middles.size + 1) >> 1
                while half:
                    if z > middles[found + half - 1]:
                        found += half
                    half >>= 1
            value[j], code[j] = table[found], found
            _feed(t[j + 1 :], feedback[j, j + 1 :], x[j] - value[j])


@_kernel
def quantize_to_integers(
    run: Any, scales: Any, points: Any, offsets: Any, top: Any, product_kind: int, value_kind: int, first: int,
    last: int,
) -> None:  # fmt: skip
    """Quantize rows `first`..`last` to integers; `scales`, `points` and `offsets` float32 [out]."""
    weight, target, values, codes, feedback = run
    width, count = weight.shape[1], int(top) + 1
    table = np.empty(count, np.float32)
    bits = table.view(np.int32)
    for row in range(first, last):
        scale, point, offset = scales[row], points[row], offsets[row]
        inverse = _ONE / scale if abs(scale) >= _SMALLEST_SCALE else _ZERO
        for k in range(count):
            table[k] = (_F32(k) - point) * scale
        _round(table, bits, product_kind)
        for k in range(count):
            table[k] += offset
        _round(table, bits, value_kind)
        x, t, value, code = weight[row], target[row], values[row], codes[row]
        for j in range(width):
            shifted = min(max((t[j] - offset) * inverse + point, _ZERO), top)
            found = int((shifted + _ROUNDER) - _ROUNDER)
            value[j], code[j] = table[found], found
            _feed(t[j + 1 :], feedback[j, j + 1 :], x[j] - value[j])
