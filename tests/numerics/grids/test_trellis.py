"""The trellis: its layout in tiles, its states, its tables, and stored bits."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from loftq_cli.numerics.grids import trellis
from loftq_cli.numerics.grids.blocks import QuantizedBlocks
from loftq_cli.numerics.grids.grid import rows_of
from loftq_cli.numerics.grids.trellis import TILE, TrellisGrid, regions, states, tiles_of_rows, values
from loftq_cli.numerics.grids.trellis_tables import has_table, table_values
from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer

SHAPES = ((32, 48), (16, 16), (35, 50), (5, 33), (18, 1), (1, 1), (3, 130))
TABLES = {
    (2, 8): "04613db7a66df850",
    (2, 10): "6aaf7267793e830d",
    (3, 8): "aadaacd9f6f251be",
    (3, 10): "afb9a0c9736f7582",
    (4, 8): "5fe0ebbcc6742ec0",
    (4, 10): "23448f9c54c7cc14",
}


def grid(bits: int = 2, dtype: torch.dtype = torch.float32, block_size: int = 32) -> TrellisGrid:
    return TrellisGrid(bits, 10, block_size, dtype, dtype)


def value(codes: Tensor, row: int, column: int, own: TrellisGrid) -> float:
    """Return table[state] of one weight by its definition: walk back through the tile, row by row, past its start."""
    n_out, n_in = codes.shape
    top, left = row // TILE * TILE, column // TILE * TILE
    places = list(itertools.product(range(top, min(top + TILE, n_out)), range(left, min(left + TILE, n_in))))
    at = places.index((row, column))
    window = 0
    for back in range(-(-own.state_bits // own.bits)):
        window |= int(codes[places[(at - back) % len(places)]]) << (back * own.bits)
    return float(own.table()[window % 2**own.state_bits])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_looked_up_by_the_window_of_a_tile(bits: int) -> None:
    own = grid(bits)
    for shape in SHAPES:
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        found = values(codes, own)
        for row, column in itertools.product(range(shape[0]), range(shape[1])):
            assert float(found[row, column]) == value(codes, row, column, own)


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_cover_every_weight_once(shape: tuple[int, int]) -> None:
    matrix = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    copy = torch.full(shape, -1.0)
    for region in regions(*shape):
        sequences = region.sequences(matrix)
        assert sequences.shape[1] == region.length <= TILE * TILE
        region.put(sequences, copy)
    assert torch.equal(copy, matrix)


def test_states_repeat_in_short_sequences() -> None:
    assert states(torch.tensor([[1, 2]], dtype=torch.uint8), 2, 8).tolist() == [[0b10011001, 0b01100110]]
    assert states(torch.tensor([[3]], dtype=torch.uint8), 2, 8).tolist() == [[0b11111111]]
    assert states(torch.tensor([[0, 1, 2, 3, 1]], dtype=torch.uint8), 3, 8)[0, 2] == 0b00001010


def test_tables_never_change() -> None:
    for (bits, state_bits), digest in TABLES.items():
        numbers = torch.tensor(table_values(bits, state_bits), dtype=torch.int16)
        assert hashlib.sha256(numbers.numpy().astype("<i2").tobytes()).hexdigest()[:16] == digest
        table = TrellisGrid(bits, state_bits, 32, torch.float32, torch.float32).table()
        assert table.shape == (2**state_bits,) and float(table.abs().max()) < 5
    assert has_table(2, 10) and not has_table(2, 11)


def test_stored_bits_have_no_tails() -> None:
    assert grid(2, torch.bfloat16, 64).information_bits(64, 128) == 64 * 128 * 2 + 64 * 2 * 16
    assert grid(3, torch.bfloat16, 64).information_bits(5, 70) == 5 * 70 * 3 + 5 * 2 * 16


def test_panels_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = grid(3, torch.bfloat16), torch.randn(53, 40, generator=torch.Generator().manual_seed(0))
    whole = TrellisQuantizer(own).quantize_residual(x, x)
    dense = trellis.dequantize(whole.quantized, own)
    monkeypatch.setattr(trellis, "PANEL", 700)
    parts = TrellisQuantizer(own).quantize_residual(x, x)
    assert torch.equal(parts.quantized.codes, whole.quantized.codes)
    assert torch.equal(parts.residual, whole.residual)
    assert torch.equal(trellis.dequantize(whole.quantized, own), dense)


def test_rows_cannot_be_taken_apart() -> None:
    quantized = QuantizedBlocks(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32))
    assert rows_of(quantized, grid(), slice(0, 16)) is None


def test_rows_of_a_table_come_with_their_tiles() -> None:
    rows, places = tiles_of_rows(torch.tensor([49, 3, 3, 17]), 50)
    assert rows.tolist() == [*range(32), 48, 49]
    assert rows[places].tolist() == [49, 3, 3, 17]
