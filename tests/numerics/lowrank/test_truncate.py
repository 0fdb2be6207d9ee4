"""Low-rank steps: Krylov against the full SVD, projections in panels, norms of any scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids import panels
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid, dequantize
from loftq_cli.numerics.lowrank import truncate as lowrank
from loftq_cli.numerics.lowrank.truncate import (
    LowRank,
    exact_low_rank,
    frobenius,
    gram_low_rank,
    krylov_low_rank,
)
from loftq_cli.numerics.methods.loftq import exact_step, fast_step, loftq
from loftq_cli.numerics.quantizers.block import BlockQuantizer


def grid(bits: int = 2, layout: str = "rows") -> BlockGrid:
    return BlockGrid(codebook("nf", bits), 64, layout, torch.float32, torch.float32)


def excess(residual: Tensor, rank: int, **arguments: object) -> float:
    """Return the relative amount by which the Krylov step's error exceeds the exact one."""
    found = krylov_low_rank(residual, rank, generator=torch.Generator().manual_seed(0), **arguments)  # type: ignore[arg-type]
    return error(residual, found) / error(residual, gram_low_rank(residual, rank)) - 1


def error(residual: Tensor, found: LowRank) -> float:
    return float((residual.double() - (found.u * found.s).double() @ found.v.T.double()).norm())


def spectra() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(700, 600, generator=g)
    u, v = (torch.linalg.qr(torch.randn(n, 64, generator=g)).Q for n in (700, 600))
    return {
        "noise": noise,
        "wide": noise.T.contiguous(),
        "one loud row": noise * torch.where(torch.arange(700) == 3, 1e4, 1.0)[:, None],
        "mean": noise + 3,
        "steep": (u * 0.5 ** torch.arange(64.0)) @ v.T + 1e-6 * noise,
        "small": noise * 1e-30,
        "large": noise * 1e30,
        "denormal": noise * 1e-40,
    }


@pytest.mark.parametrize("name", list(spectra()))
@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
def test_first_step_loses_less_than_a_thousandth(name: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "half_is_faster", lambda _residual: half)
    assert excess(spectra()[name], 8) < 1e-3


def test_later_steps_are_as_good_with_less_work() -> None:
    noise = spectra()["noise"]
    turned = noise + 0.3 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    assert excess(turned, 8, previous=gram_low_rank(noise, 8)) < 1e-3
    assert excess(turned, 8, depth=1) > 3e-3  # so the depth is needed


@pytest.mark.parametrize("shape", [(640, 520), (520, 640), (3, 2000), (2000, 1), (1, 7)])
@pytest.mark.parametrize("rank", [1, 8, 520, 5000])
def test_any_rank_of_any_shape(shape: tuple[int, int], rank: int) -> None:
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first = krylov_low_rank(residual, rank, generator=torch.Generator().manual_seed(0))
    second = krylov_low_rank(residual, rank, previous=first, generator=torch.Generator().manual_seed(0))
    k = min(rank, *shape)
    for found in (first, second):
        assert found.u.shape == (shape[0], k) and found.v.shape == (shape[1], k) and found.s.shape == (k,)
        assert torch.allclose(found.v.T @ found.v, torch.eye(k), atol=1e-4)
    if k == min(shape):
        assert torch.allclose((first.u * first.s) @ first.v.T, residual, atol=1e-3)


@pytest.mark.parametrize("kind", ["zero", "constant", "rank 3", "one element"])
def test_residuals_of_lower_rank(kind: str) -> None:
    residual = torch.zeros(640, 520)
    if kind == "constant":
        residual += 2
    if kind == "rank 3":
        residual[:, :3] = torch.randn(640, 3, generator=torch.Generator().manual_seed(0))
    if kind == "one element":
        residual[4, 5] = 3
    found = None
    for seed in range(3):
        found = krylov_low_rank(residual, 8, previous=found, generator=torch.Generator().manual_seed(seed))
        assert found.lora_a.isfinite().all() and found.lora_b.isfinite().all()
        assert frobenius(residual - found.lora_b @ found.lora_a) <= 1e-5 * frobenius(residual)


@pytest.mark.parametrize("shape", [(640, 576), (160, 96)], ids=["Krylov space", "Gram matrix"])
def test_little_left_needs_squares_in_float64(shape: tuple[int, int]) -> None:
    """The spectrum is narrow, but what is left is smaller than the errors of float32 squares."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 16, generator=g)).Q for n in shape)
    residual = (u * torch.linspace(600, 400, 16)) @ v.T + 1e-4 * torch.randn(shape, generator=g)
    assert excess(residual, 16) < 1e-4
    rough, exact = gram_low_rank(residual, 16, careful=False), gram_low_rank(residual, 16)
    assert rough.s[0] < 2 * rough.s[-1], "the spectrum alone would allow float32"
    assert error(residual, rough) > 1.0002 * error(residual, exact), "float32 is too coarse"


@pytest.mark.parametrize(("bits", "rank"), [(2, 16), (4, 64)])
def test_reported_residuals_are_the_true_ones(bits: int, rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    leading = torch.randn(640, 8, generator=g) @ torch.randn(8, 600, generator=g)
    w = leading + torch.randn(640, 600, generator=g)
    quantizer = block_quantizer(grid(bits), "cpu")
    result = loftq(w, quantizer, iters=3, low_rank=fast_step(rank, torch.Generator().manual_seed(0)))
    left = w.double() - dequantize(result.quantized, grid(bits)).double() - (result.lora_b @ result.lora_a).double()
    assert result.residual == pytest.approx(float(left.norm() / w.double().norm()), rel=1e-5)
    exact = loftq(w, quantizer, iters=3, low_rank=exact_step(rank))
    assert result.residual <= exact.residual * 1.001
    again = loftq(w, quantizer, iters=3, low_rank=fast_step(rank, torch.Generator().manual_seed(0)))
    assert torch.equal(again.lora_a, result.lora_a) and torch.equal(again.quantized.codes, result.quantized.codes)


def test_residual_by_difference_where_little_is_left() -> None:
    """If BA captures all but 1e-4 of the energy, Pythagoras would cancel, so the residual is computed directly."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(96, 4, generator=g) @ torch.randn(4, 128, generator=g) * (1 + torch.arange(96.0))[:, None]
    result = loftq(w, BlockQuantizer(grid(2)), iters=1, low_rank=lambda residual, _: exact_low_rank(residual, 90))
    left = w.double() - dequantize(result.quantized, grid(2)).double() - (result.lora_b @ result.lora_a).double()
    assert result.residual == pytest.approx(float(left.norm() / w.double().norm()), rel=1e-4)


def test_norms_of_any_scale() -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-30, 1e30, 1e-42, 0.0):
        assert frobenius(x * scale) == pytest.approx(float((x * scale).double().norm()), rel=1e-6)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "g",
    [
        grid(2, layout="rows"),
        grid(2, layout="flat"),
        AffineGrid(2, 64, "float", torch.float16, torch.float16),
        AffineGrid(4, 0, "none", torch.float16, torch.float16),
    ],
    ids=["rows", "flat", "offsets", "symmetric"],
)
@pytest.mark.parametrize("columns", [640, 650])
def test_exact_projection_in_panels(g: Grid, columns: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 650 columns the blocks of the flat layout continue from row to row, so those matrices are not divided."""
    monkeypatch.setattr(lowrank, "_cpu_multiplies_bfloat16", lambda: half)
    w = torch.randn(600, columns, generator=torch.Generator().manual_seed(3))
    results = []
    for size in (1 << 22, 1 << 14):
        monkeypatch.setattr(panels, "_PANEL", size)
        step = fast_step(200, torch.Generator().manual_seed(0))
        results.append(loftq(w, block_quantizer(g, "cpu"), iters=2, low_rank=step))
    whole, parts = results
    assert torch.equal(parts.quantized.codes, whole.quantized.codes) and parts.best == whole.best
    assert parts.residuals == pytest.approx(whole.residuals, rel=1e-6)
    left = w - dequantize(parts.quantized, g) - parts.lora_b @ parts.lora_a
    assert float(left.norm() / w.norm()) == pytest.approx(parts.residual, rel=1e-4)
