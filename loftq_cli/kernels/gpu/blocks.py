"""Block-wise quantization, dequantization and residual in one pass over memory, compiled by Triton for a GPU.

The arithmetic is that of `numerics.grids.blocks`, bit for bit: `div_rn` because Triton's `/` is approximate, and
bfloat16 by integer arithmetic because not every GPU has the instruction. The kernels must be launched without
contraction to fused multiply-adds, which round once where torch rounds twice. Finite input only.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32, BFLOAT16, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UNCORRECTED, FULL, HALF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how BA is subtracted from a target

# Bit patterns, as Triton would make a literal below float32's normal numbers a float64.
_SMALLEST_ABSMAX = tl.constexpr(0x006CE3EE)  # float32(1e-38)
_LARGEST_BFLOAT16 = tl.constexpr(0x7F7F0000)


@triton.jit
def _bfloat16_bits(x):
    """Return the bit pattern of float32 `x` rounded to bfloat16, ties to even; the lower half is zero."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


@triton.jit
def _rounded(x, kind: tl.constexpr):
    """Return `x` rounded to the dtype `kind`, ties to even, saturating."""
    if kind == BFLOAT16:
        limit = tl.full((), _LARGEST_BFLOAT16, tl.int32).to(tl.float32, bitcast=True)
        x = _bfloat16_bits(tl.minimum(tl.maximum(x, -limit), limit)).to(tl.float32, bitcast=True)
    elif kind == FLOAT16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _tile(n_blocks, row, blocks_per_row, block: tl.constexpr, width: tl.constexpr, count: tl.constexpr):
    """Return this program's blocks.

    Returns:
        Of each block [count]: its index, whether it exists, and the column where it begins. Of each of their elements
        [count, width]: its position in memory, and whether it exists. There must be fewer than 2³¹ blocks.
    """
    b = tl.program_id(0) * count + tl.arange(0, count)
    rows_done = b // blocks_per_row  # not in 64 bits, where dividing is slow
    column = (b - rows_done * blocks_per_row).to(tl.int64) * block
    j = tl.arange(0, width)[None, :]
    exists = b < n_blocks
    inside = exists[:, None] & (column[:, None] + j < row)
    if block < width:
        inside = inside & (j < block)
    return b, exists, column, (rows_done.to(tl.int64) * row + column)[:, None] + j, inside


@triton.jit
def _nearest(z, middles, bits: tl.constexpr):
    """Return how many of the 2**bits - 1 ascending thresholds `z` exceeds, by binary search."""
    code = tl.zeros(z.shape, tl.int32)
    for k in tl.static_range(bits):
        half = 1 << (bits - 1 - k)
        code += tl.where(z > tl.load(middles + code + (half - 1)), half, 0)
    return code


@triton.jit
def quantize_blocks(
    weight, target, codes, absmax, residual, sums, middles, levels,
    n_blocks, row, blocks_per_row, block: tl.constexpr, width: tl.constexpr, count: tl.constexpr,
    bits: tl.constexpr, divides_short: tl.constexpr, scale_kind: tl.constexpr, value_kind: tl.constexpr,
    corrects: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Quantize `count` blocks of `target`; compute `weight` - Q and its squared norm per program.

    Args:
        weight, target: float32 [n], row-major.
        codes: uint8 [n], output.
        absmax: float32 [n_blocks], output.
        residual: float32 [n], output; with `halves` int16 [n], which takes bfloat16 bits.
        sums: float64 [programs], output.
        middles, levels: float32 [2**bits - 1] and [2**bits].
        row: number of elements after which a new block must start.
        width: width of a tile, a power of two not less than `block`.
        divides_short: apply bitsandbytes' rule for a short last block.
        scale_kind, value_kind: the dtypes to which absmax and products are rounded.
        corrects: the target is weight - BA, with BA in `target`, which may share memory with the residual, as float32
            (FULL) or as bfloat16 bits in int16 (HALF).
    """
    b, exists, column, places, inside = _tile(n_blocks, row, blocks_per_row, block, width, count)
    w = tl.load(weight + places, mask=inside, other=0)
    if corrects == HALF:
        product = tl.load(target + places, mask=inside, other=0).to(tl.int32) << 16
        x = w - product.to(tl.float32, bitcast=True)
    elif corrects == FULL:
        x = w - tl.load(target + places, mask=inside, other=0)
    else:
        x = tl.load(target + places, mask=inside, other=0)
    scale = _rounded(tl.max(tl.abs(x), axis=1), scale_kind)
    tl.store(absmax + b, scale, mask=exists)
    smallest = tl.full((), _SMALLEST_ABSMAX, tl.int32).to(tl.float32, bitcast=True)
    safe = tl.maximum(scale, smallest)
    z = x * tl.div_rn(tl.full(safe.shape, 1.0, tl.float32), safe)[:, None]
    if divides_short:  # noqa: SIM102 - this is a compile-time condition, the next is not
        if tl.program_id(0) == tl.num_programs(0) - 1:
            divides = (row - column < block) & (scale >= smallest)
            z = tl.where(divides[:, None], tl.div_rn(x, tl.broadcast_to(safe[:, None], x.shape)), z)
    code = _nearest(z, middles, bits)
    tl.store(codes + places, code.to(tl.uint8), mask=inside)
    difference = w - _rounded(tl.load(levels + code) * scale[:, None], value_kind)
    wide = tl.where(inside, difference, 0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(wide * wide, axis=1), axis=0))
    if halves:
        tl.store(residual + places, (_bfloat16_bits(difference) >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(residual + places, difference, mask=inside)


@triton.jit
def restore_blocks(
    weight, codes, absmax, residual, levels, n_blocks, row, blocks_per_row,
    block: tl.constexpr, width: tl.constexpr, count: tl.constexpr, value_kind: tl.constexpr,
):  # fmt: skip
    """Compute `weight` - Q; all arrays float32 [n] except codes, uint8 [n], and absmax, float32 [n_blocks]."""
    b, exists, _column, places, inside = _tile(n_blocks, row, blocks_per_row, block, width, count)
    scale = tl.load(absmax + b, mask=exists, other=0)
    code = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
    value = _rounded(tl.load(levels + code) * scale[:, None], value_kind)
    tl.store(residual + places, tl.load(weight + places, mask=inside, other=0) - value, mask=inside)
