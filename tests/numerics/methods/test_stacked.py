"""LoftQ on stacks: the results of single matrices, or None for matrices that need another algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid, dequantize
from loftq_cli.numerics.lowrank import truncate as lowrank
from loftq_cli.numerics.methods.loftq import LoftQResult, fast_step, loftq
from loftq_cli.numerics.methods.stacked import may_stack, stacked_loftq
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.protocols import Quantizer

F32 = torch.float32
NF2 = BlockGrid(codebook("nf", 2), 64, "rows", F32, F32)
GRIDS: dict[str, Grid] = {
    "nf2 rows": NF2,
    "nf4 flat": BlockGrid(codebook("nf", 4), 64, "flat", torch.bfloat16, torch.bfloat16),
    "nf3 short blocks": BlockGrid(codebook("nf", 3), 40, "rows", F32, F32),
    "int3 offsets": AffineGrid(3, 32, "float", torch.float16, torch.float16),
    "int4 symmetric": AffineGrid(4, 0, "none", torch.float16, torch.float16, scale_rule="minmax"),
}
SEEDS = (11, 22, 33)


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Pretend that this machine is, or is not, faster in bfloat16."""
    monkeypatch.setattr(lowrank, "_cpu_multiplies_bfloat16", lambda: request.param)
    return request.param


def stack(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, *shape, generator=generator) * torch.rand(3, shape[0], 1, generator=generator)


def alone(weights: Tensor, quantizer: Quantizer, rank: int, iters: int = 3, **options: bool) -> list[LoftQResult]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return [
        loftq(weight, quantizer, iters=iters, low_rank=fast_step(rank, generator), **options)
        for weight, generator in zip(weights, generators)
    ]


def check(found: LoftQResult | None, single: LoftQResult, weight: Tensor, grid: Grid) -> None:
    assert found is not None
    assert found.plain_residual == pytest.approx(single.plain_residual, rel=1e-6)
    exact = 5e-5 if lowrank._cpu_multiplies_bfloat16() else 1e-5  # ties in bfloat16 lead to different iterates
    assert found.residuals == pytest.approx(single.residuals, rel=exact)
    assert found.best == single.best
    assert float((found.quantized.codes != single.quantized.codes).float().mean()) < 1e-3
    assert found.lora_a.shape == single.lora_a.shape and found.lora_b.shape == single.lora_b.shape
    left = weight - dequantize(found.quantized, grid) - found.lora_b @ found.lora_a
    assert float(left.norm() / weight.norm()) == pytest.approx(found.residual, rel=1e-4), "it reports the true residual"


@pytest.mark.parametrize("shape", [(96, 80), (80, 96), (576, 640), (640, 576)], ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_each_matrix_of_a_stack_has_its_single_result(grid: Grid, shape: tuple[int, int], half: bool) -> None:
    weights, quantizer = stack(*shape), block_quantizer(grid, "cpu")
    found = stacked_loftq(weights, quantizer, rank=4, iters=3, seeds=SEEDS)
    for one, single, weight in zip(found, alone(weights, quantizer, 4), weights):
        check(one, single, weight, grid)


@pytest.mark.parametrize("rank", [20, 160])
def test_random_columns_beside_known_ones_and_the_exact_projection_at_the_end(rank: int, half: bool) -> None:
    """20 is not a multiple of 16; 160 of 576 directions capture so much that bfloat16 would show in the residual."""
    weights, quantizer = stack(704, 576), BlockQuantizer(NF2)
    found = stacked_loftq(weights, quantizer, rank=rank, iters=2, seeds=SEEDS)
    for one, single, weight in zip(found, alone(weights, quantizer, rank, 2), weights):
        check(one, single, weight, NF2)


def test_the_best_step_of_each_is_kept_or_the_last_one() -> None:
    generator = torch.Generator().manual_seed(5)
    weights, quantizer = torch.randn(3, 96, 64, generator=generator), BlockQuantizer(NF2)
    best = stacked_loftq(weights, quantizer, rank=4, iters=6, seeds=SEEDS)
    last = stacked_loftq(weights, quantizer, rank=4, iters=6, seeds=SEEDS, keep_last=True)
    for one, other, single in zip(best, last, alone(weights, quantizer, 4, 6)):
        assert one is not None and other is not None
        assert one.best == single.best and one.residual == min(one.residuals)
        assert other.best == 6 and other.residuals == one.residuals
    assert {one.best for one in best if one} != {6}, "else this tests nothing"


def test_a_seed_gives_the_same_bits() -> None:
    weights, quantizer = stack(576, 576), block_quantizer(NF2, "cpu")
    first, second = (stacked_loftq(weights, quantizer, rank=8, iters=2, seeds=SEEDS) for _ in range(2))
    for one, other in zip(first, second):
        assert one is not None and other is not None and one.residuals == other.residuals
        assert torch.equal(one.lora_a, other.lora_a) and torch.equal(one.quantized.codes, other.quantized.codes)


def on_the_grid(weight: Tensor) -> Tensor:
    return dequantize(BlockQuantizer(NF2).quantize_residual(weight, weight).quantized, NF2)


ODD = {
    "a spectrum too wide": lambda weight: torch.cat([weight[:1] * 1e3, weight[1:]]),
    "columns that vanish": lambda weight: torch.cat([weight[:3], torch.zeros_like(weight[3:])]),
    "nothing left": on_the_grid,
    "zeros": torch.zeros_like,
    "squares that overflow": lambda weight: weight * 1e15,
    "squares that vanish": lambda weight: weight * 1e-20,
}


@pytest.mark.parametrize("size", [96, 576])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_matrix_is_left_to_loftq_and_the_others_are_not(odd, size: int, half: bool) -> None:
    weights, quantizer = stack(size, size), block_quantizer(NF2, "cpu")
    singles = alone(weights, quantizer, 8)
    weights[1] = odd(weights[1])
    found = stacked_loftq(weights, quantizer, rank=8, iters=3, seeds=SEEDS)
    assert found[1] is None
    for i in (0, 2):
        check(found[i], singles[i], weights[i], NF2)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 3e38])
def test_norms_outside_float32_are_left_to_loftq_before_anything_is_quantized(number: float) -> None:
    weights = stack(64, 64)
    weights[2, 5] = number

    class Never:
        def quantize_residual(self, weight: Tensor, target: Tensor):
            raise AssertionError("compiled quantizers are made for numbers")

    assert stacked_loftq(weights, Never(), rank=4, iters=2, seeds=SEEDS) == [None] * 3


def test_tiny_remainders_are_left_to_loftq(half: bool) -> None:
    assert stacked_loftq(stack(64, 64), BlockQuantizer(NF2), rank=48, iters=2, seeds=SEEDS) == [None] * 3


def test_which_grids_stack() -> None:
    flat = BlockGrid(codebook("nf", 4), 64, "flat", F32, F32)
    assert may_stack(NF2, 3, 70) and may_stack(AffineGrid(4, 0, "none", F32, F32), 3, 70)
    assert may_stack(flat, 4, 48) and not may_stack(flat, 3, 70)
    assert not may_stack(BlockGrid(codebook("nf", 4), 64, "flat", F32, F32, nested=True), 64, 64)
    assert not may_stack(BlockGrid(codebook("fitted", 2), 64, "rows", F32, F32), 64, 64)
