"""Trellis-coded quantization: a value depends on its own code and on the codes before it (QTIP, arXiv 2406.11235).

A matrix [out, in] is cut into tiles of 16 rows by 16 columns. Tiles at the lower and right edge are smaller where the
shape is not a multiple of 16. The weights of a tile, row by row, form one sequence. Every weight has a code of `bits`
bits. Its state is the last `state_bits` bits of the sequence of codes up to and including its own, most recent bits
lowest, and its value is table[state] · scale. Sequences are cyclic ("tail-biting"): the codes before the first weight
of a tile are those at its end, so no bits are stored besides the codes. Any code can follow any state, and a decoder
needs only a window of a few codes, so all weights can be decoded in parallel.

Codes are stored at their weights' own places, [out, in], packed like those of other grids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.numerics.grids.blocks import Layout, QuantizedBlocks, round_to
from loftq_cli.numerics.grids.codebooks import TRELLIS
from loftq_cli.numerics.grids.trellis_tables import TABLE_SCALE, table_values

TILE = 16  # rows and columns of a tile

PANEL = 1 << 20  # elements processed together on the CPU; more on a GPU
_PANEL_GPU = 1 << 25


@dataclass(frozen=True)
class TrellisGrid:
    """How `packed` stores a matrix [out, in] with a trellis.

    Attributes:
        bits: new bits for each weight: 2, 3 or 4.
        state_bits: bits that determine a value, L in QTIP.
        block_size: elements of a row that share a scale; the last block of a row may be shorter.
        scale_dtype: dtype of the stored scales.
        value_dtype: dtype to which the loader rounds `table[state] * scale` (the product is computed in float32).
    """

    bits: int
    state_bits: int
    block_size: int
    scale_dtype: torch.dtype
    value_dtype: torch.dtype

    @property
    def data_type(self) -> str:
        """The name of the levels in a recipe."""
        return next(name for name, state_bits in TRELLIS.items() if state_bits == self.state_bits)

    @property
    def layout(self) -> Layout:
        """Blocks run along rows."""
        return "rows"

    def n_blocks(self, out_features: int, in_features: int) -> int:
        """Return the number of scales of a matrix of this shape."""
        return out_features * -(-in_features // self.block_size)

    def information_bits(self, out_features: int, in_features: int) -> int:
        """Return the number of bits in codes and scales. The table is part of the program, and there are no tails."""
        scales = 8 * self.scale_dtype.itemsize * self.n_blocks(out_features, in_features)
        return out_features * in_features * self.bits + scales

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the value of each state, float32 [2**state_bits]."""
        compiling = torch.compiler.is_compiling()  # the compiler warns about the cache
        return (_table.__wrapped__ if compiling else _table)(self.bits, self.state_bits, torch.device(device))


@dataclass(frozen=True)
class Region:
    """Tiles of equal shape in a matrix: [height, width] each."""

    rows: slice
    columns: slice
    height: int
    width: int

    @property
    def length(self) -> int:
        """The number of weights in a tile."""
        return self.height * self.width

    def sequences(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [tiles, length], tiles in order of rows, then columns."""
        tiles = matrix[self.rows, self.columns].unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
        return tiles.transpose(1, 2).reshape(-1, self.length)

    def put(self, sequences: Tensor, matrix: Tensor) -> None:
        """The inverse of `sequences`: write into `matrix` [out, in]."""
        there = matrix[self.rows, self.columns]
        tiles = sequences.reshape(there.shape[0] // self.height, -1, self.height, self.width)
        there.copy_(tiles.transpose(1, 2).reshape(there.shape))


def regions(out_features: int, in_features: int) -> Iterator[Region]:
    """Yield the up to four parts of a matrix whose tiles have equal shapes."""
    for rows, height in _parts(out_features):
        for columns, width in _parts(in_features):
            yield Region(rows, columns, height, width)


def row_panels(matrix: Tensor) -> Iterator[slice]:
    """Return slices of whole tiles of rows, few enough for their temporaries to stay small."""
    step = (_PANEL_GPU if matrix.is_cuda else PANEL) // max(1, matrix.shape[1])
    step = max(1, step // TILE) * TILE
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def values(codes: Tensor, grid: TrellisGrid, table: Tensor | None = None) -> Tensor:
    """Return table[state] of every weight: uint8 codes [out, in] -> float32 [out, in].

    Rows must begin at a tile's first row and end at the matrix's last row or a tile's last one.

    Args:
        table: the grid's own table, if the caller has it at hand.
    """
    table = grid.table(codes.device) if table is None else table
    found = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for region in regions(*codes.shape):
        state = states(region.sequences(codes), grid.bits, grid.state_bits)
        region.put(table.index_select(0, state.reshape(-1)).reshape(state.shape), found)
    return found


def tiles_of_rows(rows: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """Return all rows of the tiles that contain some rows, ascending, and the places of the latter among them.

    Args:
        rows: int64 [n], of a matrix with `out_features` rows.
    """
    tiles = torch.unique(rows // TILE)
    every = (tiles.unsqueeze(1) * TILE + torch.arange(TILE, device=rows.device)).reshape(-1)
    places = torch.searchsorted(tiles, rows // TILE) * TILE + rows % TILE
    return every[every < out_features], places


def states(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """Return the state of every weight of cyclic sequences: uint8 codes [n, length] -> int32 [n, length]."""
    recent = codes.int()
    state = recent.clone()
    for back in range(1, -(-state_bits // bits)):
        # A sequence shorter than the window repeats in it.
        state |= recent.roll(back, dims=1) << (back * bits)
    return state & (2**state_bits - 1)


def dequantize(quantized: QuantizedBlocks, grid: TrellisGrid) -> Tensor:
    """Return what the container's loader computes: float32 [out, in] holding values of the grid's value dtype."""
    codes, table = quantized.codes, grid.table(quantized.codes.device)
    scales = quantized.absmax.view(codes.shape[0], -1)
    dense = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in row_panels(codes):
        found = values(codes[rows], grid, table)
        dense[rows] = round_to(found.mul_(spread(scales[rows], grid, codes.shape[1])), grid.value_dtype)
    return dense


def spread(numbers: Tensor, grid: TrellisGrid, columns: int) -> Tensor:
    """Repeat one number per block for each of its elements: [rows, blocks] -> [rows, columns]."""
    return numbers.repeat_interleave(grid.block_size, dim=1)[:, :columns]


def row_blocks(matrix: Tensor, grid: TrellisGrid) -> Tensor:
    """[rows, columns] -> [rows * blocks, block_size]; short last blocks are padded with zeros."""
    rest = -matrix.shape[1] % grid.block_size
    return (F.pad(matrix, (0, rest)) if rest else matrix).reshape(-1, grid.block_size)


@lru_cache(maxsize=64)
def _table(bits: int, state_bits: int, device: torch.device) -> Tensor:
    # A cached inference tensor would poison later training.
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(table_values(bits, state_bits), dtype=torch.float32, device=device) / TABLE_SCALE


def _parts(size: int) -> Iterator[tuple[slice, int]]:
    """Yield the whole tiles along one dimension, and the rest; with the size of one tile."""
    whole = size // TILE * TILE
    if whole:
        yield slice(0, whole), TILE
    if whole < size:
        yield slice(whole, size), size - whole
