"""The same bits with any number of threads: results must not depend on how workers share the cores."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.lowrank.deterministic import product
from loftq_cli.numerics.methods.loftq import exact_step, fast_step, loftq

GRID = BlockGrid(codebook("nf", 2), 64, "rows", torch.bfloat16, torch.bfloat16)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Through the exact Gram matrix, the Krylov space of both orientations, and the full SVD.
@pytest.mark.parametrize("shape", [(256, 704), (1024, 768), (700, 1200)])
def test_loftq_computes_the_same_bits_with_any_number_of_threads(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for exact in (False, True) if shape[0] == 256 else (False,):
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            step = exact_step(8) if exact else fast_step(8, torch.Generator().manual_seed(0))
            results.append(loftq(weight, block_quantizer(GRID, "cpu"), iters=2, low_rank=step))
            assert torch.get_num_threads() == count
        for other in results[1:]:
            assert torch.equal(other.quantized.codes, results[0].quantized.codes)
            assert torch.equal(other.lora_a, results[0].lora_a) and torch.equal(other.lora_b, results[0].lora_b)
            assert other.residuals == results[0].residuals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_equals_matmul(dtype: torch.dtype) -> None:
    # A long inner dimension and a narrow result: here libraries split the sum among threads.
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(4096, 1025, generator=generator).to(dtype)
    right = torch.randn(4096, 16, generator=generator).to(dtype)
    results = []
    for count in (1, 2, 4, 8):
        torch.set_num_threads(count)
        results.append(product(left.T, right))
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0].double(), left.T.double() @ right.double(), rtol=2e-2, atol=0.5)
