"""Codebooks, block grids and packing: golden values, the arithmetic of bitsandbytes, round trips."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import pytest
import torch

from loftq_cli.errors import UsageError
from loftq_cli.numerics.grids.blocks import BlockGrid, dequantize, quantize
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.packing import pack_rows, packed_width, unpack_rows

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def published_nf(bits: int, symmetric: bool) -> list[float]:
    """LoftQ's `create_normal_map`, with the standard library's normal quantile instead of scipy's."""
    quantile = NormalDist().inv_cdf
    offset, size = 0.9677083, 2**bits
    if symmetric:
        edges = [quantile(p) for p in torch.linspace(1 - offset, offset, size + 1).tolist()]
        values = [0.5 * low + 0.5 * high for low, high in itertools.pairwise(edges)]
    else:
        above = [quantile(p) for p in torch.linspace(offset, 0.5, size // 2 + 1)[:-1].tolist()]
        below = [-quantile(p) for p in torch.linspace(offset, 0.5, size // 2)[:-1].tolist()]
        values = [*below, 0.0, *above]
    top = max(values)
    return sorted(value / top for value in values)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("data_type", ["nf", "nf-sym"])
def test_nf_levels_are_the_published_ones(bits: int, data_type: str) -> None:
    expected = published_nf(bits, symmetric=data_type == "nf-sym")
    assert codebook(data_type, bits).levels == pytest.approx(expected, abs=3e-7)


def test_nf4_is_bitsandbytes_table() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(codebook("nf", 4).levels), functional.get_4bit_type("nf4", "cpu"))


def test_uniform_is_the_papers_grid() -> None:
    assert codebook("uniform", 2).levels == (-1.0, -1 / 3, 1 / 3, 1.0)
    for bits in (3, 4, 8):
        levels = torch.tensor(codebook("uniform", bits).levels, dtype=torch.float64)
        assert torch.allclose(levels, torch.linspace(-1, 1, 2**bits, dtype=torch.float64))


def test_eight_bits_are_uniform_and_others_refused() -> None:
    assert codebook("nf", 8).data_type == "uniform"
    for wrong in (("nf", 5), ("nf", 1), ("nf4", 4)):
        with pytest.raises(UsageError):
            codebook(*wrong)


def brute_force(x: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Find the nearest level of every element, block by block, without any of the library's indexing."""
    levels = torch.tensor(grid.codebook.levels)
    rows = [x.reshape(-1)] if grid.layout == "flat" else list(x)
    out = []
    for row in rows:
        for block in row.split(grid.block_size):
            absmax = block.abs().max().to(grid.scale_dtype).float()
            scaled = block / absmax if absmax > 0 else torch.zeros_like(block)
            nearest = (scaled[:, None] - levels).abs().argmin(1)
            out.append((levels[nearest] * absmax).to(grid.value_dtype).float())
    return torch.cat(out).reshape(x.shape)


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(8, 256), (5, 100), (3, 33), (7, 300), (1, 1)])
def test_quantize_takes_the_nearest_level_of_every_block(layout: str, block_size: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    for bits, dtype in itertools.product((2, 3, 4, 8), (F32, BF16, F16)):
        grid = BlockGrid(codebook("nf", bits), block_size, layout, dtype, dtype)
        quantized = quantize(x, grid)
        assert quantized.absmax.numel() == grid.n_blocks(*shape)
        assert torch.equal(dequantize(quantized, grid), brute_force(x, grid))


def test_scales_hold_only_values_of_their_dtype() -> None:
    torch.manual_seed(0)
    grid = BlockGrid(codebook("nf", 2), 64, "rows", BF16, BF16)
    quantized = quantize(torch.randn(16, 128), grid)
    assert torch.equal(quantized.absmax, quantized.absmax.to(BF16).float())
    q = dequantize(quantized, grid)
    assert torch.equal(q, q.to(BF16).float())


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 1e30, 1e-45, 65504.0, -3e38])
def test_extreme_blocks_stay_finite(value: float) -> None:
    for layout, dtype in itertools.product(("rows", "flat"), (F32, BF16, F16)):
        grid = BlockGrid(codebook("nf", 4), 64, layout, dtype, dtype)
        q = dequantize(quantize(torch.full((3, 70), value), grid), grid)
        assert q.isfinite().all()
        if value == 0:
            assert torch.equal(q, torch.zeros(3, 70))


def test_requantizing_the_result_changes_nothing() -> None:
    """Every block uses a level of ±1, so it keeps its absmax, and dense files re-quantize to themselves."""
    torch.manual_seed(0)
    for bits, dtype in itertools.product((2, 4), (F32, BF16)):
        grid = BlockGrid(codebook("nf", bits), 64, "rows", dtype, dtype)
        first = quantize(torch.randn(32, 256), grid)
        again = quantize(dequantize(first, grid), grid)
        assert torch.equal(first.codes, again.codes) and torch.equal(first.absmax, again.absmax)


GOLDEN_ROWS = {
    2: ([0, 1, 2, 3, 3], bytes([0b11100100, 0b00000011])),
    3: ([1, 2, 3, 4, 5, 6, 7, 0, 7], bytes([0b11010001, 0b01011000, 0b00011111, 0b00000111])),
    4: ([0x1, 0x2, 0xF], bytes([0x21, 0x0F])),
    8: ([0, 255, 7], bytes([0, 255, 7])),
}


@pytest.mark.parametrize("bits", GOLDEN_ROWS)
def test_packed_bytes_are_golden(bits: int) -> None:
    codes, expected = GOLDEN_ROWS[bits]
    assert bytes(pack_rows(torch.tensor([codes], dtype=torch.uint8), bits)[0].tolist()) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_round_trips_at_every_width(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in range(1, 70):
        codes = torch.randint(0, 2**bits, (3, columns), generator=generator, dtype=torch.uint8)
        packed = pack_rows(codes, bits)
        assert packed.shape == (3, packed_width(columns, bits)) and packed.dtype == torch.uint8
        assert torch.equal(unpack_rows(packed, bits, columns), codes)
        # Rows are independent: splitting the packed matrix is the same as splitting the matrix.
        assert torch.equal(packed[1:2], pack_rows(codes[1:2], bits))
