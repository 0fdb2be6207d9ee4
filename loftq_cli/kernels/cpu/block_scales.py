"""Block scales of least squared error, compiled by numba: `numerics.quantizers.block_scales`, bit for bit.

A tile of blocks is transposed so that elements to be added share a lane: lane l of step j holds element
`STEPS * l + j`. Then every loop runs along lanes, which LLVM vectorises, and nothing is summed across a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loftq_cli.kernels.cpu.blocks import CHUNK, _inline, _kernel, _round
from loftq_cli.numerics.quantizers.block_scales import STEPS

TILE = 4096  # elements: with the working arrays of a pass they fit in the first-level cache
LANES = TILE // STEPS

_F32, _I32 = np.float32, np.int32
_TINY = np.float32(1e-38)


@_inline
def _nearest_first(x: Any, inverse: Any, value: Any, m0: Any, m1: Any, m2: Any, l0: Any, d0: Any, d1: Any, d2: Any):
    for i in range(x.size):
        z = x[i] * inverse[i]
        value[i] = l0 + _I32(z > m0) * d0 + _I32(z > m1) * d1 + _I32(z > m2) * d2


@_inline
def _nearest_next(x: Any, inverse: Any, value: Any, m0: Any, m1: Any, m2: Any, d0: Any, d1: Any, d2: Any):
    for i in range(x.size):
        z = x[i] * inverse[i]
        value[i] += _I32(z > m0) * d0 + _I32(z > m1) * d1 + _I32(z > m2) * d2


@_inline
def _search(x: Any, inverse: Any, code: Any, middles: Any, half: Any) -> None:
    for i in range(x.size):
        code[i] += half * _I32(x[i] * inverse[i] > middles[code[i] + half - 1])


@_inline
def _look_up(code: Any, levels: Any, value: Any) -> None:
    for i in range(code.size):
        value[i] = levels[code[i]]


@_inline
def _nearest(x: Any, inverse: Any, code: Any, value: Any, middles: Any, levels: Any) -> None:
    """Find the nearest level of each lane. Levels are added as int32 bit patterns, which is exact."""
    if levels.size > 16:
        code[:] = 0
        half = (middles.size + 1) >> 1
        while half:
            _search(x, inverse, code, middles, _I32(half))
            half >>= 1
        _look_up(code, levels, value)
    else:
        v, t, m = value.view(np.int32), levels.view(np.int32), middles
        _nearest_first(x, inverse, v, m[0], m[1], m[2], t[0], t[1] - t[0], t[2] - t[1], t[3] - t[2])
        for k in range(3, middles.size, 3):
            _nearest_next(
                x, inverse, v, m[k], m[k + 1], m[k + 2], t[k + 1] - t[k], t[k + 2] - t[k + 1], t[k + 3] - t[k + 2]
            )


@_inline
def _add_products(x: Any, value: Any, xc: Any, cc: Any) -> None:
    for i in range(x.size):
        xc[i] += value[i] * x[i]
        cc[i] += value[i] * value[i]


@_inline
def _add_weighted_products(x: Any, weight: Any, value: Any, xc: Any, cc: Any) -> None:
    for i in range(x.size):
        weighted = value[i] * weight[i]
        xc[i] += weighted * x[i]
        cc[i] += weighted * value[i]


@_inline
def _multiply(value: Any, factor: Any, product: Any) -> None:
    for i in range(value.size):
        product[i] = value[i] * factor[i]


@_inline
def _add_squares(x: Any, product: Any, inverse_unit: Any, error: Any) -> None:
    for i in range(x.size):
        difference = x[i] - product[i] * inverse_unit[i]
        error[i] += difference * difference


@_inline
def _add_weighted_squares(x: Any, weight: Any, product: Any, inverse_unit: Any, error: Any) -> None:
    for i in range(x.size):
        difference = x[i] - product[i] * inverse_unit[i]
        error[i] += difference * difference * weight[i]


@_inline
def _add_pairs(source: Any, target: Any) -> None:
    for i in range(target.size):
        target[i] = source[2 * i] + source[2 * i + 1]


@_inline
def _largest_of_pairs(source: Any, target: Any) -> None:
    for i in range(target.size):
        target[i] = max(source[2 * i], source[2 * i + 1])


@_inline
def _largest(x: Any, largest: Any) -> None:
    for i in range(x.size):
        largest[i] = max(largest[i], abs(x[i]))


@_inline
def _transpose(elements: Any, tile: Any, step: Any) -> None:
    for lane in range(tile.size):
        tile[lane] = elements[STEPS * lane + step]


@_inline
def _spread(per_block: Any, lanes: Any) -> None:
    """Copy each block's number to all its lanes."""
    parts = lanes.size // per_block.size
    for b in range(per_block.size):
        lanes[b * parts : (b + 1) * parts] = per_block[b]


@_inline
def _invert(scale: Any, inverse: Any) -> None:
    for b in range(scale.size):
        inverse[b] = np.copysign(_F32(1) / max(abs(scale[b]), _TINY), scale[b])


@_inline
def _fold(lanes: Any, spare: Any, total: Any) -> None:
    """Compute `total`, the sums over each block, from the partial sums on its lanes, in pairs."""
    size = lanes.size >> 1
    while size > total.size:
        _add_pairs(lanes[: 2 * size], spare[:size])
        lanes[:size] = spare[:size]
        size >>= 1
    _add_pairs(lanes[: 2 * size], total)


@_kernel
def _fit(
    tile: Any, weights: Any, scale: Any, per_block: Any, per_lane: Any, code: Any, middles: Any, levels: Any,
    xc: Any, cc: Any,
) -> None:  # fmt: skip
    """Compute, per block, Σ w x c and Σ w c c for the levels c that are nearest with `scale`."""
    inverse, value, first, second = per_lane[0], per_lane[1], per_lane[2], per_lane[3]
    _invert(scale, per_block)
    _spread(per_block, inverse)
    first[:], second[:] = 0, 0
    for step in range(STEPS):
        here = slice(step * LANES, (step + 1) * LANES)
        x = tile[here]
        _nearest(x, inverse, code, value, middles, levels)
        if weights.size:
            _add_weighted_products(x, weights[here], value, first, second)
        else:
            _add_products(x, value, first, second)
    _fold(first, value, xc)
    _fold(second, value, cc)


@_kernel
def _evaluate(
    tile: Any, weights: Any, stored: Any, inverse_unit: Any, scale: Any, per_block: Any, per_lane: Any, code: Any,
    middles: Any, levels: Any, value_kind: int, fits: bool, error: Any, xc: Any, cc: Any,
) -> None:  # fmt: skip
    """Compute the true squared error for the scales `stored`, with products rounded as the loader does.

    Sets `scale` to `stored` in units. With `fits`, also computes the sums that `_fit` computes.
    """
    inverse, value, first, second = per_lane[0], per_lane[1], per_lane[2], per_lane[3]
    sums, factor, product, unit = per_lane[4], per_lane[5], per_lane[6], per_lane[7]
    for b in range(stored.size):
        scale[b] = stored[b] * inverse_unit[b]
    _invert(scale, per_block)
    _spread(per_block, inverse)
    _spread(stored, factor)
    _spread(inverse_unit, unit)
    first[:], second[:], sums[:] = 0, 0, 0
    for step in range(STEPS):
        here = slice(step * LANES, (step + 1) * LANES)
        x = tile[here]
        _nearest(x, inverse, code, value, middles, levels)
        _multiply(value, factor, product)
        _round(product, product.view(np.int32), value_kind)
        if weights.size:
            _add_weighted_squares(x, weights[here], product, unit, sums)
            if fits:
                _add_weighted_products(x, weights[here], value, first, second)
        else:
            _add_squares(x, product, unit, sums)
            if fits:
                _add_products(x, value, first, second)
    _fold(sums, value, error)
    if fits:
        _fold(first, value, xc)
        _fold(second, value, cc)


@_inline
def _refit(scale: Any, xc: Any, cc: Any, signed: bool) -> None:
    """Set `scale` to the parabola's minimum, if there is one of an allowed sign."""
    for b in range(scale.size):
        if cc[b] > 0 and (xc[b] > 0 or (signed and xc[b] < 0)):
            scale[b] = xc[b] / cc[b]


@_inline
def _load(source: Any, elements: Any, first: int, count: int, row: int, block: int) -> None:
    """Copy `count` blocks of `source` from block `first` on; short blocks are padded with zeros."""
    blocks_per_row = -(-row // block)
    elements[:] = 0
    for i in range(count):
        done, b = divmod(first + i, blocks_per_row)
        begin, end = done * row + b * block, min(done * row + (b + 1) * block, (done + 1) * row)
        elements[i * block : i * block + end - begin] = source[begin:end]


@_inline
def _load_weights(column_weight: Any, elements: Any, first: int, count: int, row: int, block: int) -> None:
    blocks_per_row = -(-row // block)
    elements[:] = 0
    for i in range(count):
        done, b = divmod(first + i, blocks_per_row)
        begin, end = done * row + b * block, min(done * row + (b + 1) * block, (done + 1) * row)
        for j in range(end - begin):
            elements[i * block + j] = column_weight[(begin + j) % column_weight.size]


@_inline
def _units(tile: Any, largest: Any, spare: Any, absmax: Any, unit: Any, inverse_unit: Any) -> None:
    """Compute the largest power of two up to each block's absmax, and absmax in units of it."""
    largest[:] = 0
    for step in range(STEPS):
        _largest(tile[step * LANES : (step + 1) * LANES], largest)
    size = LANES
    while size > absmax.size:
        size >>= 1
        _largest_of_pairs(largest[: 2 * size], spare[:size])
        largest[:size] = spare[:size]
    absmax[:] = largest[: absmax.size]
    bits, unit_bits, inverse_bits = absmax.view(np.int32), unit.view(np.int32), inverse_unit.view(np.int32)
    for b in range(absmax.size):
        exponent = min(max(bits[b] & _I32(0x7F800000), _I32(0x00800000)), _I32(0x7E800000))
        unit_bits[b] = exponent
        inverse_bits[b] = _I32(0x7F000000) - exponent
        absmax[b] *= inverse_unit[b]


@_kernel
def fit_chunks(
    target: Any, scales: Any, column_weight: Any, middles: Any, levels: Any, starts: Any, row: int, block: int,
    scale_kind: int, value_kind: int, signed: bool, improves: bool, guards: bool, refits: int, first: int, last: int,
) -> None:  # fmt: skip
    """Fit the scales of chunks `first`..`last`.

    Args:
        target: float32 [n], row-major.
        scales: float32 [n_blocks], the output; with `improves` also the scales to start from.
        column_weight: float32 [in], or empty.
        middles, levels: from `blocks.padded`.
        starts: fractions of absmax.
        row: number of elements after which a new block must start.
        scale_kind, value_kind: the dtypes to which scales and products are rounded.
        guards: keep scales to start from if they are better than the fit from them.
        refits: number of fits after the first.
    """
    elements, tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    weights = np.empty(TILE if column_weight.size else 0, np.float32)
    per_lane, code = np.empty((8, LANES), np.float32), np.empty(LANES, np.int32)
    per_tile = TILE // block
    numbers = np.empty((10, per_tile), np.float32)
    absmax, unit, inverse_unit, scale, xc = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    cc, gain, error, before, spare = numbers[5], numbers[6], numbers[7], numbers[8], numbers[9]
    for start in range(first * CHUNK, min(last * CHUNK, scales.size), per_tile):
        count = min(per_tile, scales.size - start)
        _load(target, elements, start, count, row, block)
        for step in range(STEPS):
            _transpose(elements, tile[step * LANES : (step + 1) * LANES], step)
        if column_weight.size:
            _load_weights(column_weight, elements, start, count, row, block)
            for step in range(STEPS):
                _transpose(elements, weights[step * LANES : (step + 1) * LANES], step)
        _units(tile, per_lane[0], per_lane[1], absmax, unit, inverse_unit)
        _spread(inverse_unit, per_lane[0])
        for step in range(STEPS):
            here = tile[step * LANES : (step + 1) * LANES]
            _multiply(here, per_lane[0], here)
        if improves:
            before[:] = 0
            before[:count] = scales[start : start + count]
            if guards:
                _evaluate(
                    tile, weights, before, inverse_unit, scale, spare, per_lane, code, middles, levels, value_kind,
                    True, error, xc, cc,
                )  # fmt: skip
            else:
                for b in range(per_tile):
                    scale[b] = before[b] * inverse_unit[b]
                _fit(tile, weights, scale, spare, per_lane, code, middles, levels, xc, cc)
            _refit(scale, xc, cc, signed)
        else:
            scale[:] = absmax
            gain[:] = -1
            for fraction in starts:
                for b in range(per_tile):
                    before[b] = absmax[b] * fraction
                _fit(tile, weights, before, spare, per_lane, code, middles, levels, xc, cc)
                _refit(before, xc, cc, signed)
                for b in range(per_tile):
                    found = xc[b] * xc[b] / cc[b] if cc[b] > 0 else _F32(0)
                    if found > gain[b]:
                        gain[b], scale[b] = found, before[b]
        for _ in range(refits):
            _fit(tile, weights, scale, spare, per_lane, code, middles, levels, xc, cc)
            _refit(scale, xc, cc, signed)
        for b in range(per_tile):
            scale[b] *= unit[b]
        if scale_kind:
            _round(scale, scale.view(np.int32), scale_kind)
        if improves and guards:
            _evaluate(
                tile, weights, scale, inverse_unit, absmax, spare, per_lane, code, middles, levels, value_kind, False,
                gain, xc, cc,
            )  # fmt: skip
            for b in range(per_tile):
                if not gain[b] < error[b]:
                    scale[b] = before[b]
        scales[start : start + count] = scale[:count]
