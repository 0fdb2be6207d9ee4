"""LoftQ under a whitening: equal to the plain step for S = I, and optimal for every other S."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.methods.loftq import exact_step, fast_step, loftq
from loftq_cli.numerics.methods.weighted import WeightedStep, Whitening, weighted_loftq, whiten
from loftq_cli.numerics.quantizers.block import BlockQuantizer

RANK = 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(n: int, kind: str, seed: int = 1) -> Tensor:
    """Return the second moment of inputs with a few large and correlated channels."""
    inputs = random(4 * n, n, seed=seed) * torch.logspace(-1, 1, n) @ (torch.eye(n) + 0.2 * random(n, n, seed=seed + 1))
    full = inputs.T @ inputs / len(inputs)
    return full if kind == "full" else full.diagonal()


@pytest.fixture
def quantizer() -> BlockQuantizer:
    return BlockQuantizer(BlockGrid(codebook("nf", 2), 32, "rows", torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_root_is_a_root(kind: str) -> None:
    s = moment(24, kind)
    whitening = whiten(s, damping=0.0)
    wanted = s / (s if kind == "diagonal" else s.diagonal()).mean()
    root = whitening.root.diag() if kind == "diagonal" else whitening.root
    torch.testing.assert_close(root @ root.T, wanted.diag() if kind == "diagonal" else wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whitening.variances, wanted if kind == "diagonal" else wanted.diagonal().clone())
    x = random(7, 24)
    torch.testing.assert_close(whitening.undo(whitening.apply(x)), x, rtol=1e-3, atol=1e-4)


def test_inputs_never_seen_keep_the_root_invertible() -> None:
    s = moment(16, "full")
    s[3], s[:, 3] = 0, 0
    for m in (s, s.diagonal().clone()):
        whitening = whiten(m)
        assert torch.isfinite(whitening.undo(random(4, 16))).all()
    assert torch.equal(whiten(torch.zeros(16)).root, torch.ones(16))
    assert torch.equal(whiten(torch.zeros(16, 16)).root, torch.ones(16))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_identity_is_plain_loftq(kind: str, quantizer: BlockQuantizer) -> None:
    weight = random(48, 64) * 0.1
    s = torch.ones(64) if kind == "diagonal" else torch.eye(64)
    step = exact_step(RANK)
    plain = loftq(weight, quantizer, iters=4, low_rank=step)
    weighted = weighted_loftq(weight, quantizer, whiten(s, damping=0.0), iters=4, low_rank=step)
    assert weighted.result.best == plain.best
    assert weighted.result.residuals == pytest.approx(plain.residuals, rel=1e-5)
    assert weighted.residual == pytest.approx(plain.residual, rel=1e-5)
    assert weighted.plain_residual == pytest.approx(plain.plain_residual, rel=1e-5)
    assert torch.equal(weighted.result.quantized.codes, plain.quantized.codes)
    torch.testing.assert_close(
        weighted.result.lora_b @ weighted.result.lora_a, plain.lora_b @ plain.lora_a, rtol=1e-3, atol=1e-5
    )


def weighted_error(residual: Tensor, product: Tensor, whitening: Whitening) -> float:
    return float(whitening.apply(residual - product).double().norm())


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_no_product_of_the_rank_is_better(kind: str, shape: tuple[int, int]) -> None:
    residual, whitening = random(*shape, seed=3), whiten(moment(shape[1], kind), damping=1e-3)
    found = WeightedStep(whitening, exact_step(RANK))(residual, None)
    best = weighted_error(residual, found.lora_b @ found.lora_a, whitening)
    unweighted = exact_step(RANK)(residual, None)
    assert best < weighted_error(residual, unweighted.lora_b @ unweighted.lora_a, whitening)
    for seed in range(20):  # nor is any nearby product
        b = found.lora_b + 0.03 * random(shape[0], RANK, seed=seed)
        a = found.lora_a + 0.03 * random(RANK, shape[1], seed=seed + 50)
        assert best < weighted_error(residual, b @ a, whitening)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_gradient_vanishes(kind: str) -> None:
    residual, whitening = random(20, 16, seed=4).double(), whiten(moment(16, kind), damping=1e-2)
    whitening = Whitening(whitening.root.double())
    found = WeightedStep(Whitening(whitening.root.float()), exact_step(RANK))(residual.float(), None)
    b, a = found.lora_b.double().requires_grad_(), found.lora_a.double().requires_grad_()
    error = whitening.apply(residual - b @ a).square().sum()
    error.backward()
    assert b.grad is not None and a.grad is not None
    scale = float(whitening.apply(residual).square().sum())
    assert float(b.grad.norm()) < 1e-4 * scale and float(a.grad.norm()) < 1e-4 * scale


def test_factors_are_balanced_like_loftq_s() -> None:
    found = WeightedStep(whiten(moment(20, "full")), exact_step(RANK))(random(30, 20), None)
    torch.testing.assert_close(found.lora_b.T @ found.lora_b, found.lora_a @ found.lora_a.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_kept_iterate_has_the_smallest_weighted_residual(kind: str, quantizer: BlockQuantizer) -> None:
    weight, whitening = random(48, 64, seed=7) * 0.1, whiten(moment(64, kind))

    def run(iters: int, keep_last: bool = False):
        step = exact_step(RANK)
        return weighted_loftq(weight, quantizer, whitening, iters=iters, low_rank=step, keep_last=keep_last)

    best, last = run(5), [run(iters, keep_last=True) for iters in range(1, 6)]
    assert best.residual == min(each.residual for each in last) < best.plain_residual
    assert last[best.result.best - 1].residual == best.residual and last[4].result.best == 5
    plain = loftq(weight, quantizer, iters=5, low_rank=exact_step(RANK))
    assert best.result.residual > plain.residual  # the unweighted norm is larger


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_warm_start_changes_only_the_cost(kind: str) -> None:
    """Krylov, started from the last step's factors, finds the same as the exact step."""
    weight, whitening = random(600, 560, seed=8) * torch.logspace(0, -2, 560), whiten(moment(560, kind))
    exact = WeightedStep(whitening, exact_step(RANK))(weight, None)
    step = WeightedStep(whitening, fast_step(RANK, torch.Generator().manual_seed(0)))
    cold = step(weight + 0.001 * random(600, 560, seed=9), None)
    warm = step(weight, cold)
    errors = [weighted_error(weight, f.lora_b @ f.lora_a, whitening) for f in (exact, warm)]
    assert errors[0] <= errors[1] * (1 + 1e-6) and errors[1] == pytest.approx(errors[0], rel=1e-3)
