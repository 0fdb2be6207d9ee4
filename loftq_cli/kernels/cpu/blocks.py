"""Block-wise quantization, dequantization and residual in one pass over memory, compiled by numba.

The arithmetic is that of `numerics.grids.blocks`, bit for bit. Loops are written so that LLVM vectorises them: short
functions over one block's slices, no branches, and int32 bit patterns where float semantics would forbid reordering.
Finite input only.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

CHUNK = 256  # blocks whose squares are summed together, so that sums do not depend on the number of threads
FLOAT32, BFLOAT16, FLOAT16 = range(3)
UNCORRECTED, FULL, HALF = range(3)  # how BA is subtracted from a target

_F32, _I32 = np.float32, np.int32
_SMALLEST_ABSMAX = np.float32(1e-38)


# Inlined by numba itself: passing slices to a compiled function would cost as much as the work on one block.
_inline = numba.njit(nogil=True, error_model="numpy", inline="always")


def _kernel(function: Any) -> Any:
    # nogil: the caller's threads run the kernel in parallel. numba's thread layer aborts if it is entered twice.
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no directory to cache the machine code in
        return numba.njit(nogil=True, error_model="numpy")(function)


@_inline
def _largest_bits(bits: Any) -> Any:
    """Return the bit pattern of the largest magnitude: floats of one sign are ordered like their bits as integers."""
    largest = _I32(0)
    for j in range(bits.size):
        largest = max(largest, bits[j] & _I32(0x7FFFFFFF))
    return largest


@_inline
def _round(values: Any, bits: Any, kind: int) -> None:
    """Round float32 `values` to bfloat16 or float16 in place, ties to even, saturating; `bits` is their int32 view."""
    if kind == BFLOAT16:
        for j in range(bits.size):
            size = min(bits[j] & _I32(0x7FFFFFFF), _I32(0x7F7F0000))
            size = (size + 0x7FFF + ((size >> 16) & 1)) & 0x7FFF0000
            bits[j] = _I32(size) | (bits[j] & _I32(-0x80000000))
    elif kind == FLOAT16:
        for j in range(bits.size):
            sign = bits[j] & _I32(-0x80000000)
            size = min(bits[j] & _I32(0x7FFFFFFF), _I32(0x477FE000))
            if size >= 0x38800000:
                bits[j] = _I32((size + 0xFFF + ((size >> 13) & 1)) & 0x7FFFE000) | sign
            else:  # float16's subnormals are multiples of float32's spacing at 0.5
                values[j] = (abs(values[j]) + _F32(0.5)) - _F32(0.5)
                bits[j] |= sign


@_inline
def _assign_first(
    x: Any, factor: Any, code: Any, value: Any, m0: Any, m1: Any, m2: Any, l0: Any, l1: Any, l2: Any, l3: Any
) -> None:
    """Find codes 0..3 by three comparisons. Levels are int32 bit patterns, so that adding differences is exact."""
    d0, d1, d2 = l1 - l0, l2 - l1, l3 - l2
    for j in range(x.size):
        z = x[j] * factor
        above0, above1, above2 = _I32(z > m0), _I32(z > m1), _I32(z > m2)
        code[j] = above0 + above1 + above2
        value[j] = l0 + above0 * d0 + above1 * d1 + above2 * d2


@_inline
def _assign_next(
    x: Any, factor: Any, code: Any, value: Any, m0: Any, m1: Any, m2: Any, l0: Any, l1: Any, l2: Any, l3: Any
) -> None:
    """Compare with three more levels, and update `code` and `value`."""
    d0, d1, d2 = l1 - l0, l2 - l1, l3 - l2
    for j in range(x.size):
        z = x[j] * factor
        above0, above1, above2 = _I32(z > m0), _I32(z > m1), _I32(z > m2)
        code[j] += above0 + above1 + above2
        value[j] += above0 * d0 + above1 * d1 + above2 * d2


@_inline
def _search(x: Any, factor: Any, code: Any, middles: Any, half: Any) -> None:
    """Do one step of a binary search for all elements, for codebooks too long to compare with every level."""
    for j in range(x.size):
        code[j] += half * _I32(x[j] * factor > middles[code[j] + half - 1])


@_inline
def _look_up(codes: Any, absmax: Any, levels: Any, value: Any) -> None:
    for j in range(codes.size):
        value[j] = levels[codes[j]] * absmax


@_inline
def _divide(x: Any, absmax: Any, scaled: Any) -> None:
    for j in range(x.size):
        scaled[j] = x[j] / absmax


@_inline
def _narrow(code: Any, codes: Any) -> None:
    for j in range(codes.size):
        codes[j] = np.uint8(code[j])


@_inline
def _subtract(weight: Any, value: Any, difference: Any) -> None:
    for j in range(weight.size):
        difference[j] = weight[j] - value[j]


@_inline
def _subtract_bfloat16(weight: Any, half: Any, bits: Any, difference: Any) -> None:
    for j in range(weight.size):
        bits[j] = _I32(half[j]) << 16
    for j in range(weight.size):
        difference[j] = weight[j] - difference[j]


@_inline
def _add_squares(residual: Any, lanes: Any) -> None:
    for j in range(residual.size):
        wide = np.float64(residual[j])
        lanes[j] += wide * wide


@_inline
def _to_bfloat16(bits: Any, half: Any) -> None:
    for j in range(half.size):
        size = bits[j] & _I32(0x7FFFFFFF)
        rounded = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
        half[j] = np.uint16(rounded | ((bits[j] >> 16) & 0x8000))


@_inline
def _compare(
    x: Any, absmax: Any, reciprocal: Any, code: Any, value_bits: Any, middles: Any, levels: Any,
    table: Any, table_bits: Any, kind: int,
) -> None:  # fmt: skip
    """Find codes and dequantized values (bit patterns) of one block by comparing with every threshold."""
    for k in range(table.size):
        table[k] = levels[k] * absmax
    _round(table, table_bits, kind)
    t, m = table_bits, middles
    _assign_first(x, reciprocal, code, value_bits, m[0], m[1], m[2], t[0], t[1], t[2], t[3])
    for k in range(3, middles.size, 3):
        _assign_next(x, reciprocal, code, value_bits, m[k], m[k + 1], m[k + 2], t[k], t[k + 1], t[k + 2], t[k + 3])


@_inline
def _find(
    x: Any, absmax: Any, reciprocal: Any, code: Any, value: Any, value_bits: Any, middles: Any, levels: Any, kind: int
) -> None:
    """Do the same by binary search, for codebooks too long to compare with every threshold."""
    code[:] = 0
    half = (middles.size + 1) >> 1
    while half:
        _search(x, reciprocal, code, middles, _I32(half))
        half >>= 1
    _look_up(code, absmax, levels, value)
    _round(value, value_bits, kind)


@_kernel
def quantize_chunks(
    weight: Any, target: Any, codes: Any, absmax: Any, residual: Any, half: Any, sums: Any,
    middles: Any, levels: Any, row: int, block: int, divides_short: bool, scale_kind: int, value_kind: int,
    corrects: int, fitted: bool, first: int, last: int,
) -> None:  # fmt: skip
    """Quantize chunks `first`..`last` of `target`; compute `weight` - Q and its squared norm per chunk.

    Args:
        weight, target: float32 [n], row-major.
        codes: uint8 [n], output.
        absmax: float32 [n_blocks], output; with `fitted` the scales to use, which may be negative.
        residual: float32 [n], output; or empty if `half`, uint16 [n], takes its bfloat16 bits.
        sums: float64 [n_chunks], output.
        middles, levels: from `padded`.
        row: number of elements after which a new block must start.
        divides_short: apply bitsandbytes' rule for a short last block.
        scale_kind, value_kind: the dtypes to which absmax and products are rounded.
        corrects: the target is weight - BA, with BA in `target` (FULL), which may share memory with the residual, or in
            `half` as bfloat16 bits (HALF). Each block of BA is read before it is overwritten.
    """
    value, code, corrected = np.empty(block, np.float32), np.empty(block, np.int32), np.empty(block, np.float32)
    corrected_bits, difference = corrected.view(np.int32), np.empty(block, np.float32)
    scaled, lanes = np.empty(block, np.float32), np.empty(block, np.float64)
    table = np.empty(levels.size if levels.size <= 16 else 0, np.float32)
    value_bits, table_bits = value.view(np.int32), table.view(np.int32)
    difference_bits, absmax_bits = difference.view(np.int32), absmax.view(np.int32)
    blocks_per_row = -(-row // block)
    for chunk in range(first, last):
        lanes[:] = 0.0
        rows_done = chunk * CHUNK // blocks_per_row
        row_end = (rows_done + 1) * row
        end = rows_done * row + (chunk * CHUNK - rows_done * blocks_per_row) * block
        for b in range(chunk * CHUNK, min((chunk + 1) * CHUNK, absmax.size)):
            begin, end = end, min(end + block, row_end)
            row_end += row if end == row_end else 0
            size = end - begin
            x = corrected[:size]
            if corrects == HALF:
                _subtract_bfloat16(weight[begin:end], half[begin:end], corrected_bits, corrected)
            elif corrects == FULL:
                _subtract(weight[begin:end], target[begin:end], corrected)
            else:
                x = target[begin:end]
            if not fitted:
                absmax_bits[b] = _largest_bits(x.view(np.int32))
                if scale_kind != FLOAT32:
                    _round(absmax[b : b + 1], absmax_bits[b : b + 1], scale_kind)
            scale = absmax[b]
            reciprocal = np.copysign(_F32(1) / max(abs(scale), _SMALLEST_ABSMAX), scale)
            if divides_short and not fitted and size < block and scale >= _SMALLEST_ABSMAX:
                _divide(x, scale, scaled)
                x, reciprocal = scaled[:size], _F32(1)
            if table.size:
                _compare(x, scale, reciprocal, code, value_bits, middles, levels, table, table_bits, value_kind)
            else:
                _find(x, scale, reciprocal, code, value, value_bits, middles, levels, value_kind)
            _narrow(code, codes[begin:end])
            _subtract(weight[begin:end], value, difference)
            _add_squares(difference[:size], lanes)
            if half.size:
                _to_bfloat16(difference_bits, half[begin:end])
            else:
                residual[begin:end] = difference[:size]
        sums[chunk] = lanes.sum()


@_kernel
def restore_chunks(
    weight: Any, codes: Any, absmax: Any, residual: Any, levels: Any, row: int, block: int, value_kind: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """Compute `weight` - Q for chunks `first`..`last`; all float32 [n] except codes, uint8 [n]."""
    value, code = np.empty(block, np.float32), np.empty(block, np.int32)
    value_bits = value.view(np.int32)
    blocks_per_row = -(-row // block)
    for b in range(first * CHUNK, min(last * CHUNK, absmax.size)):
        begin = b // blocks_per_row * row + b % blocks_per_row * block
        end = min(begin + block, (b // blocks_per_row + 1) * row)
        for j in range(end - begin):
            code[j] = codes[begin + j]
        _look_up(code[: end - begin], absmax[b], levels, value)
        _round(value, value_bits, value_kind)
        _subtract(weight[begin:end], value, residual[begin:end])


def padded(middles: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pad thresholds to a multiple of three with infinity, as the kernel compares with three of them at a time."""
    if levels.size > 16:
        return middles, levels
    extra = -middles.size % 3
    return np.pad(middles, (0, extra), constant_values=np.inf), np.pad(levels, (0, extra), mode="edge")
