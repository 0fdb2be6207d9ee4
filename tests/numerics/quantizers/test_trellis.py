"""The trellis's quantizer: fitted scales, extreme matrices, golden bytes, and the gain over other levels."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels import block_quantizer, column_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import dequantize
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.numerics.lowrank.truncate import frobenius
from loftq_cli.numerics.methods.ldlq_metric import metric
from loftq_cli.numerics.methods.ldlq_steps import refit, sweep_columns
from loftq_cli.numerics.methods.refined import TRELLIS_FEEDBACK, refined
from loftq_cli.numerics.methods.refined_steps import shallow_steps
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, blocks_of
from loftq_cli.numerics.quantizers.trellis import TrellisQuantizer

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def grid(bits: int = 2, dtype: torch.dtype = BF16) -> TrellisGrid:
    return TrellisGrid(bits, 10, 64, dtype, dtype)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(x: Tensor, own: TrellisGrid, previous: QuantizeStep | None = None) -> QuantizeStep:
    return TrellisQuantizer(own, block_quantizer(own, "cpu").encode).quantize_fitted(x, x, previous=previous)


@pytest.mark.parametrize("shape", [(37, 130), (16, 64), (3, 5)])
def test_the_compiled_quantizer_equals_plain_torch(shape: tuple[int, int]) -> None:
    x = matrix(*shape)
    weight = torch.rand(shape[1]) + 0.2
    plain, fast = TrellisQuantizer(grid(3)), block_quantizer(grid(3), "cpu")
    assert fast.encode is not plain.encode
    for step in (
        lambda q: q.quantize_residual(x, x),
        lambda q: q.quantize_fitted(x, x, column_weight=weight),
        lambda q: q.quantize_fitted(x, 0.9 * x, previous=q.quantize_residual(x, x)),
    ):
        one, other = step(plain), step(fast)
        assert torch.equal(one.quantized.codes, other.quantized.codes)
        assert torch.equal(one.quantized.absmax, other.quantized.absmax)
        assert torch.equal(one.residual, other.residual)


def test_golden_bytes() -> None:
    """Codes and scales of a fixed matrix: any change of the algorithm changes the bytes that users get."""
    x = torch.sin(torch.arange(40 * 100, dtype=torch.float64) ** 1.3).float().reshape(40, 100)
    found = blocks_of(quantized(x, grid()))
    content = found.codes.numpy().tobytes() + found.absmax.numpy().astype("<f4").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "4b824c597106e947"


@pytest.mark.parametrize(("bits", "most"), [(2, 0.88), (3, 0.89), (4, 0.93)])
def test_residuals_are_below_those_of_fitted_levels(bits: int, most: float) -> None:
    x = matrix(96, 256, 3) + matrix(96, 4) @ matrix(4, 256, 1)
    scalar = BlockGrid(codebook("fitted", bits), 64, "rows", BF16, BF16, signed=True)
    run = [
        refined(
            x,
            block_quantizer(own, "cpu"),
            iters=12,
            low_rank=shallow_steps(8, torch.Generator().manual_seed(0)),
            levels=scalar.levels() if isinstance(own, BlockGrid) else None,
            **({} if own is scalar else {"schedule": TRELLIS_FEEDBACK}),
        )
        for own in (scalar, grid(bits))
    ]
    assert run[1].residual < most * run[0].residual
    found = dequantize(run[1].quantized, grid(bits))
    left = frobenius(x - found - run[1].lora_b @ run[1].lora_a) / frobenius(x)
    assert left == pytest.approx(run[1].residual, rel=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_extreme_matrices(dtype: torch.dtype) -> None:
    x = matrix(20, 70)
    cases = {
        "zero": torch.zeros_like(x),
        "tiny": x * 1e-30,
        "denormal": x * 1e-41,
        "constant": torch.full_like(x, -0.3),
        "one": torch.zeros_like(x).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(7.0)),
        "outliers": torch.where(x > 2, 100 * x, x),
        "rows of every magnitude": x * torch.logspace(-6, 3, 20).unsqueeze(1),
    }
    for name, case in cases.items():
        step = quantized(case, grid(2, dtype))
        found = blocks_of(step)
        assert bool(torch.isfinite(found.absmax).all()) and bool(torch.isfinite(step.residual).all()), name
        assert frobenius(step.residual) <= max(1e-30, frobenius(case)) * 1.0001, name
        assert torch.equal(found.absmax, found.absmax.to(dtype).float())
        assert torch.equal(step.residual, case - dequantize(found, grid(2, dtype)))


def test_more_rounds_lower_the_error() -> None:
    x = matrix(64, 128) ** 3
    first = quantized(x, grid())
    norm = frobenius(first.residual)
    assert frobenius(quantized(x, grid(), first).residual) < norm


@pytest.mark.parametrize("shape", [(40, 150), (16, 64)])
def test_columns_with_feedback_lower_the_weighted_error(shape: tuple[int, int]) -> None:
    x = matrix(*shape)
    inputs = matrix(600, shape[1], 5) @ (torch.eye(shape[1]) + 0.3 * matrix(shape[1], shape[1], 6))
    found = metric(inputs.T @ inputs / 600)
    eased = found.without(None)
    columns = column_quantizer(grid(), "cpu")
    sweep = columns.sweep(x, eased.conditional_variances, None)
    assert (sweep.tile, sweep.block) == (16, 64)
    swept = sweep_columns(x, sweep, columns, eased)
    assert isinstance(swept.quantized, QuantizedBlocks)
    assert torch.equal(swept.values, dequantize(swept.quantized, grid()))
    error = frobenius(found.apply(x - swept.values))
    assert error < 0.9 * frobenius(found.apply(quantized(x, grid()).residual))
    better = refit(swept, x, columns, 64, eased)
    assert torch.equal(better.values, dequantize(better.quantized, grid()))
    assert frobenius(found.apply(x - better.values)) < error
