"""Decode packed codes to dense rows, fast enough to repeat it in every forward and backward pass.

The result is `formats.packed.PackedFormat.decode`, bit for bit: level * scale (+ zero) in float32, one rounding to the
grid's value dtype. Codes are looked up one byte (at 3 bits: twelve bits) at a time, without a tensor of single codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.grids.packing import unpack_rows
from loftq_cli.numerics.grids.trellis import TrellisGrid, row_panels, values

# Bits looked up at once: a whole number of codes, with a table that fits the first-level cache (3 bits: second).
_INDEX_BITS = {2: 8, 3: 12, 4: 8, 8: 8}

# Type of one element that holds a table row of so many float32 levels: gathering single elements is twice as fast.
_WIDE = {4: torch.complex128, 2: torch.complex64, 1: torch.float32}

# Elements decoded at a time. Besides the result, only the float32 values of one step are in memory; on the CPU they fit
# the cache.
_STEP_CPU = 2**22
_STEP_GPU = 2**25


def decode_rows(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: Grid,
    columns: int,
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:
    """Decode rows of a packed matrix.

    Args:
        packed: uint8 [rows, packed_width(columns, bits)].
        scales: [rows, blocks of a row] in the grid's scale dtype: absmax of a codebook, scale of integers.
        zeros: the same shape, the value of code 0, if the grid has one.
        dtype: the values, already rounded to `grid.value_dtype`, are cast to this.
        levels: float32 [2**bits], the matrix's own; None for the codebook's.

    Returns:
        `dtype` [rows, columns].
    """
    if isinstance(grid, TrellisGrid):
        return _decode_trellis(packed, scales, grid, columns, dtype)
    rows = packed.shape[0]
    # When compiling, call the function itself, because the compiler warns about the cache.
    compiling = torch.compiler.is_compiling()
    if levels is None:
        table = (_lookup_table.__wrapped__ if compiling else _lookup_table)(levels_of(grid), packed.device)
    else:
        index = (_code_table.__wrapped__ if compiling else _code_table)(grid.bits, packed.device)
        table = _widened(levels.to(packed.device)[index])
    block_size = grid.block_size or columns
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, (_STEP_CPU if packed.device.type == "cpu" else _STEP_GPU) // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = _look_up(table, packed[part], grid.bits)[:, :columns]
        _blockwise(Tensor.mul_, values, scales[part].float(), block_size)
        if zeros is not None:
            _blockwise(Tensor.add_, values, zeros[part].float(), block_size)
        values = _saturate(values, grid)
        # If `out` has the value dtype, copying into it is the only rounding.
        out[part] = values if dtype == grid.value_dtype else values.to(grid.value_dtype)
    return out


def _decode_trellis(packed: Tensor, scales: Tensor, grid: TrellisGrid, columns: int, dtype: torch.dtype) -> Tensor:
    """Decode rows that begin at a tile's first row."""
    out = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    table = grid.table(packed.device)
    for part in row_panels(out):
        found = values(unpack_rows(packed[part], grid.bits, columns), grid, table)
        _blockwise(Tensor.mul_, found, scales[part].float(), grid.block_size)
        found = _saturate(found, grid)
        out[part] = found if dtype == grid.value_dtype else found.to(grid.value_dtype)
    return out


def levels_of(grid: BlockGrid | AffineGrid) -> tuple[float, ...]:
    """Return the value of code 0, 1, … before scale and zero."""
    if isinstance(grid, BlockGrid):
        return grid.codebook.levels
    lowest = -(2 ** (grid.bits - 1)) if grid.zero == "none" else 0
    return tuple(float(lowest + code) for code in range(2**grid.bits))


def _look_up(table: Tensor, packed: Tensor, bits: int) -> Tensor:
    """Return float32 levels [rows, at least the row's codes]."""
    if _INDEX_BITS[bits] == 12:
        grouped = F.pad(packed, (0, -packed.shape[1] % 3)).unflatten(1, (-1, 3)).int()
        low, middle, high = grouped.unbind(-1)
        index = torch.stack([low | (middle & 0xF) << 8, middle >> 4 | high << 4], dim=-1)
    else:
        index = packed.int()
    found = table.index_select(0, index.reshape(-1))
    return found.view(torch.float32).reshape(packed.shape[0], -1)


def _blockwise(operation: Callable[[Tensor, Tensor], Tensor], values: Tensor, numbers: Tensor, block_size: int) -> None:
    """Apply an in-place operation to each block and its number; the last block of a row may be short."""
    n_full = values.shape[1] // block_size
    cut = n_full * block_size
    if n_full:
        operation(values[:, :cut].unflatten(1, (n_full, block_size)), numbers[:, :n_full].unsqueeze(-1))
    if cut < values.shape[1]:
        operation(values[:, cut:], numbers[:, n_full:])


def _saturate(values: Tensor, grid: Grid) -> Tensor:
    """Keep values finite in the value dtype, as `blocks.round_to` does, where they can exceed it: levels of a codebook
    are at most 1."""
    limit = torch.finfo(grid.value_dtype).max
    safe = isinstance(grid, BlockGrid) and torch.finfo(grid.scale_dtype).max <= limit
    return values if safe or grid.value_dtype == torch.float32 else values.clamp_(-limit, limit)


@lru_cache(maxsize=64)
def _lookup_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Row i: the levels of the codes that the bits of i stand for, as one wide element where the device has those."""
    # A cached inference tensor would poison later training.
    with torch.inference_mode(False), torch.no_grad():
        bits = len(levels).bit_length() - 1
        return _widened(torch.tensor(levels, dtype=torch.float32, device=device)[_code_table.__wrapped__(bits, device)])


@lru_cache(maxsize=64)
def _code_table(bits: int, device: torch.device) -> Tensor:
    """Return a table whose row i has the codes that the bits of i contain."""
    index_bits = _INDEX_BITS[bits]
    with torch.inference_mode(False), torch.no_grad():
        words = torch.arange(2**index_bits, dtype=torch.int32)
        codes = [(words >> shift) & (2**bits - 1) for shift in range(0, index_bits, bits)]
        return torch.stack(codes, dim=1).to(device)


def _widened(table: Tensor) -> Tensor:
    """View rows of float32 as single elements of the device's widest type."""
    if table.device.type not in ("cpu", "cuda"):
        return table
    return table.view(_WIDE[table.shape[1]]).squeeze(1)
