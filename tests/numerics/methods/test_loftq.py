"""LoftQ: compared with a literal restatement of Algorithm 1, the fast step with the exact one, and the start."""

from __future__ import annotations

import pytest
import torch
from support.matrices import weight

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid, dequantize, quantize
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.methods.loftq import exact_step, fast_step, loftq, plain_start
from loftq_cli.numerics.quantizers.block import BlockQuantizer

F32 = torch.float32


def grid(bits: int, data_type: str = "nf") -> BlockGrid:
    return BlockGrid(codebook(data_type, bits), 64, "rows", F32, F32)


def algorithm_1(w: torch.Tensor, bits: int, rank: int, iters: int) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Run the paper's Algorithm 1, line by line, in float64; return (residual, Q, AB) of every step."""
    product, steps = torch.zeros_like(w), []
    for _ in range(iters):
        q = dequantize(quantize(w - product, grid(bits)), grid(bits))
        u, s, vh = torch.linalg.svd((w - q).double(), full_matrices=False)
        product = ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()
        steps.append((float((w - q - product).norm() / w.norm()), q, product))
    return steps


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [4, 16])
def test_every_step_is_algorithm_1(bits: int, rank: int) -> None:
    w = weight()
    expected = algorithm_1(w, bits, rank, 5)
    result = loftq(w, BlockQuantizer(grid(bits)), iters=5, low_rank=exact_step(rank))
    assert result.residuals == pytest.approx([step[0] for step in expected], rel=2e-4)
    best = min(range(5), key=lambda i: expected[i][0])
    assert result.best == best + 1 and result.residual == min(result.residuals)
    assert result.lora_b.shape == (96, rank) and result.lora_a.shape == (rank, 160)
    assert result.lora_a.dtype == result.lora_b.dtype == F32


def test_the_result_reports_its_own_residual() -> None:
    w = weight()
    result = loftq(w, BlockQuantizer(grid(2)), iters=5, low_rank=exact_step(8))
    q = dequantize(result.quantized, grid(2))
    left = (w - q - result.lora_b @ result.lora_a).double().norm() / w.double().norm()
    assert float(left) == pytest.approx(result.residual, rel=1e-5)
    plain = (w - dequantize(quantize(w, grid(2)), grid(2))).double().norm() / w.double().norm()
    assert float(plain) == pytest.approx(result.plain_residual, rel=1e-6)
    assert result.residual < result.plain_residual


def test_factors_are_split_evenly() -> None:
    """sqrt(S) on both sides: both factors have the same Gram matrix, diagonal."""
    result = loftq(weight(), BlockQuantizer(grid(2)), iters=1, low_rank=exact_step(8))
    left, right = result.lora_b.T @ result.lora_b, result.lora_a @ result.lora_a.T
    assert torch.allclose(left, right, atol=1e-3)
    assert torch.allclose(left, torch.diag(left.diagonal()), atol=1e-3)


def test_keep_last_is_the_papers_literal_iterate() -> None:
    w = weight(64, 64)
    best = loftq(w, BlockQuantizer(grid(2)), iters=12, low_rank=exact_step(32))
    last = loftq(w, BlockQuantizer(grid(2)), iters=12, low_rank=exact_step(32), keep_last=True)
    assert best.residuals == last.residuals and last.best == 12 and last.residual == last.residuals[-1]
    assert best.best < 12, "at 2 bits and this rank later steps are worse"


def test_a_diverging_run_is_stopped_and_its_best_step_kept() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    short, long = (loftq(w, BlockQuantizer(grid(2)), iters=iters, low_rank=exact_step(4)) for iters in (5, 10_000))
    assert 5 < len(long.residuals) < 1000 and long.residuals[-1] > 1000 * long.plain_residual
    assert long.residuals[:5] == short.residuals and long.best == short.best == 3
    assert torch.equal(long.quantized.codes, short.quantized.codes) and torch.equal(long.lora_a, short.lora_a)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("shape", [(512, 512), (256, 704), (704, 256)])
def test_fast_step_is_within_a_thousandth_of_the_exact_one(bits: int, rank: int, shape: tuple[int, int]) -> None:
    w = weight(*shape)
    exact = loftq(w, BlockQuantizer(grid(bits)), iters=5, low_rank=exact_step(rank))
    fast = loftq(w, BlockQuantizer(grid(bits)), iters=5, low_rank=fast_step(rank, torch.Generator().manual_seed(0)))
    assert fast.residual <= exact.residual * 1.001


@pytest.mark.parametrize("step", ["exact", "fast"])
@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(64, 128),
        torch.ones(64, 128),
        torch.full((64, 128), 1e-30),
        torch.full((64, 128), 1e30),
        weight(64, 128) * 1e-30,
        weight(64, 128) * 1e30,
        torch.eye(64) * 5,
        weight(3, 64),
        weight(64, 1),
    ],
    ids=["zero", "constant", "tiny", "huge", "1e-30", "1e30", "identity", "three rows", "one column"],
)
def test_odd_but_valid_matrices(step: str, w: torch.Tensor) -> None:
    rank = min(8, *w.shape)
    low_rank = exact_step(rank) if step == "exact" else fast_step(rank, torch.Generator().manual_seed(0))
    result = loftq(w, BlockQuantizer(grid(4)), iters=3, low_rank=low_rank)
    assert result.lora_a.isfinite().all() and result.lora_b.isfinite().all()
    assert result.lora_a.shape == (rank, w.shape[1]) and result.lora_b.shape == (w.shape[0], rank)
    assert 0 <= result.residual <= result.plain_residual + 1e-6


def test_qlora_start_changes_nothing() -> None:
    w = weight()
    result = plain_start(w, BlockQuantizer(grid(4)), rank=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result.lora_b, torch.zeros(96, 8)) and result.residuals == () and result.best == 0
    # PEFT's range: kaiming_uniform_ with a = sqrt(5).
    assert result.lora_a.abs().max() <= 160**-0.5 and result.lora_a.std() == pytest.approx(160**-0.5 / 3**0.5, rel=0.1)
    assert torch.equal(result.quantized.codes, quantize(w, grid(4)).codes)


def test_seed_decides_everything() -> None:
    w = weight(256, 256)
    runs = [
        loftq(w, BlockQuantizer(grid(2)), iters=3, low_rank=fast_step(4, torch.Generator().manual_seed(seed)))
        for seed in (1, 1)
    ]
    assert torch.equal(runs[0].lora_a, runs[1].lora_a) and torch.equal(runs[0].quantized.codes, runs[1].quantized.codes)


@pytest.mark.parametrize(("bits", "rank"), [(2, 16), (4, 64)])
@pytest.mark.parametrize("model", ["minilm", "small_llama"])
def test_fast_step_on_trained_matrices(model: str, rank: int, bits: int, request: pytest.FixtureRequest) -> None:
    """Real matrices of every shape, compared at every step and at the step that is kept."""
    from safetensors.torch import load_file

    weights = {}
    for file in request.getfixturevalue(model).glob("*.safetensors"):
        weights |= load_file(file)
    chosen = [name for name, w in weights.items() if w.ndim == 2 and ("layers.2." in name or "layer.3." in name)]
    assert len(chosen) >= 6
    for name in chosen:
        w = weights[name].float()
        quantizer = block_quantizer(grid(bits), "cpu")
        exact = loftq(w, quantizer, iters=5, low_rank=exact_step(rank))
        fast = loftq(w, quantizer, iters=5, low_rank=fast_step(rank, torch.Generator().manual_seed(0)))
        assert fast.residual <= exact.residual * 1.001, name
        assert all(a <= b * 1.001 for a, b in zip(fast.residuals, exact.residuals)), name
