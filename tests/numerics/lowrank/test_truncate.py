"""The compiled quantizer against its plain-torch twin, and the Krylov low-rank step against the full SVD."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loftq_cli import kernels
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids import panels
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid, midpoints
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid, dequantize
from loftq_cli.numerics.lowrank import truncate as lowrank
from loftq_cli.numerics.lowrank.truncate import exact_low_rank, frobenius, gram_low_rank, krylov_low_rank
from loftq_cli.numerics.methods.loftq import exact_step, fast_step, loftq
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.protocols import FusedQuantizer, QuantizeStep, Scratch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOOKS = [("nf", 2), ("nf", 3), ("nf", 4), ("nf-sym", 3), ("uniform", 2), ("uniform", 4), ("uniform", 8)]


def grid(bits: int = 2, data_type: str = "nf", **changes: object) -> BlockGrid:
    settings: dict = {"block_size": 64, "layout": "rows", "scale_dtype": F32, "value_dtype": F32, **changes}
    return BlockGrid(codebook(data_type, bits), **settings)


def matrices(levels: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """What can go wrong in rounding: ties, signed zeros, denormals, both ends of float32, every magnitude at once."""
    g = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=g)
    ties = torch.cat([midpoints(levels), levels, torch.tensor([1.0, -1.0, 0.0, -0.0])])
    return {
        "random": x,
        "ties": ties[torch.randint(len(ties), x.shape, generator=g)] * 0.02,
        "zero": torch.zeros_like(x),
        "negative zero": -torch.zeros_like(x),
        "tiny": x * 1e-30,
        "denormal": x * 1e-41,
        "huge": (x * 1e38).clamp(-3.4e38, 3.4e38),
        "beyond float16": x * 1e5,
        "constant": torch.full_like(x, -0.3),
        "every magnitude": x * torch.pow(10.0, torch.randint(-40, 38, x.shape, generator=g).float()),
    }


def assert_same(compiled: QuantizeStep, plain: QuantizeStep) -> None:
    assert torch.equal(compiled.quantized.codes, plain.quantized.codes)
    assert torch.equal(compiled.quantized.absmax, plain.quantized.absmax)
    assert torch.equal(compiled.residual, plain.residual)
    assert compiled.residual_norm() == pytest.approx(plain.residual_norm(), rel=1e-6)


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize(("data_type", "bits"), BOOKS)
def test_compiled_quantizer_is_the_plain_one_bit_for_bit(data_type: str, bits: int, layout: str) -> None:
    for scale_dtype, value_dtype in [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16)]:
        for block_size, (rows, columns) in [
            (64, (37, 100)),
            (64, (64, 128)),
            (32, (5, 63)),
            (128, (1, 7)),
            (48, (9, 96)),
        ]:
            g = grid(
                bits, data_type, layout=layout, scale_dtype=scale_dtype, value_dtype=value_dtype, block_size=block_size
            )
            compiled = block_quantizer(g, "cpu")
            assert isinstance(compiled, FusedQuantizer)
            for name, w in matrices(g.levels(), rows, columns).items():
                target = w + 0.01 * w.flip(0) if name == "random" else w
                assert_same(compiled.quantize_residual(w, target), BlockQuantizer(g).quantize_residual(w, target))


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_matrix_on_any_number_of_threads(layout: str, threads: int) -> None:
    g = grid(4, layout=layout, value_dtype=BF16)
    w = torch.randn(555, 777, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        step = block_quantizer(g, "cpu").quantize_residual(w, w)
    finally:
        torch.set_num_threads(before)
    assert_same(step, BlockQuantizer(g).quantize_residual(w, w))
    assert step.norm == block_quantizer(g, "cpu").quantize_residual(w, w).norm


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_target_made_in_the_kernel(layout: str, half: bool) -> None:
    g = grid(2, layout=layout)
    generator = torch.Generator().manual_seed(0)
    w, change = (torch.randn(130, 200, generator=generator) for _ in range(2))
    found = exact_low_rank(change, 4)
    quantizer, twin = block_quantizer(g, "cpu"), BlockQuantizer(g)
    assert isinstance(quantizer, FusedQuantizer) and isinstance(twin, FusedQuantizer)
    scratch = quantizer.quantize_corrected(w, None, half=half)
    assert_same(scratch, twin.quantize_corrected(w, None, half=half))
    codes = torch.empty_like(scratch.quantized.codes)
    step = quantizer.quantize_corrected(w, found, half=half, scratch=Scratch(scratch.residual, codes))
    assert step.residual.data_ptr() == scratch.residual.data_ptr() and step.quantized.codes is codes
    assert_same(step, twin.quantize_corrected(w, found, half=half))
    assert step.residual.dtype == (BF16 if half else F32)
    assert torch.equal(quantizer.restore(w, step.quantized), w - dequantize(step.quantized, g))


@pytest.mark.parametrize("value_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize(("data_type", "bits"), BOOKS)
def test_residual_restored_from_the_codes(data_type: str, bits: int, layout: str, value_dtype: torch.dtype) -> None:
    g = grid(bits, data_type, layout=layout, scale_dtype=BF16, value_dtype=value_dtype)
    w = torch.randn(37, 300, generator=torch.Generator().manual_seed(0))
    step = block_quantizer(g, "cpu").quantize_residual(w, w)
    restored = block_quantizer(g, "cpu").restore(w, step.quantized)  # type: ignore[attr-defined]
    assert torch.equal(restored, step.residual) and torch.equal(restored, BlockQuantizer(g).restore(w, step.quantized))


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
def test_the_exact_projection_goes_by_rows(g: Grid, columns: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 650 columns the blocks of the flat layout run on from row to row: those are taken whole."""
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


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_later_steps_do_not_overwrite_the_codes_that_are_kept(bits: int, keep_last: bool) -> None:
    """At 2 bits an early step is kept, at 4 bits the last."""
    w, g, kept = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), grid(bits), set()
    for iters in range(1, 9):
        found = loftq(w, block_quantizer(g, "cpu"), iters=iters, low_rank=exact_step(4), keep_last=keep_last)
        twin = loftq(w, BlockQuantizer(g), iters=iters, low_rank=exact_step(4), keep_last=keep_last)
        assert torch.equal(found.quantized.codes, twin.quantized.codes) and found.best == twin.best
        kept.add(iters - found.best)
    assert (max(kept) > 1) == (bits == 2 and not keep_last)


def test_plain_torch_takes_over_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loftq_cli.kernels.cpu.block_quantizer", None)  # what a missing numba looks like
    kernels._compiled_quantizers.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain torch takes over"):
            assert isinstance(block_quantizer(grid(2), "cpu"), BlockQuantizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(block_quantizer(grid(4), "cpu"), BlockQuantizer)
    finally:
        kernels._compiled_quantizers.cache_clear()


@pytest.mark.parametrize("writable", [True, False])
def test_works_without_a_place_for_machine_code(writable: bool, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from loftq_cli.kernels import block_quantizer; assert 'numba' not in sys.modules\n"
        "from loftq_cli.numerics.grids.blocks import BlockGrid\n"
        "from loftq_cli.numerics.grids.codebooks import codebook\n"
        "g = BlockGrid(codebook('nf', 4), 64, 'rows', torch.float32, torch.float32)\n"
        "print(type(block_quantizer(g, 'cpu')).__name__)"
    )
    place = {"NUMBA_CACHE_DIR": str(tmp_path)} if writable else {"NUMBA_CACHE_LOCATOR_CLASSES": "_NoLocator"}
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, env={**os.environ, **place}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "CompiledQuantizer", done.stderr


def excess(residual: Tensor, rank: int, **arguments: object) -> float:
    """How much larger than the exact one the Krylov step's error is."""
    found = krylov_low_rank(residual, rank, generator=torch.Generator().manual_seed(0), **arguments)  # type: ignore[arg-type]
    best = gram_low_rank(residual, rank)
    wide = residual.double()
    errors = [float((wide - (x.u * x.s).double() @ x.v.T.double()).norm()) for x in (found, best)]
    return errors[0] / errors[1] - 1


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
    assert excess(turned, 8, depth=1) > 3e-3  # what the depth is for


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
    """All but 1e-4 of the energy captured: Pythagoras would cancel, so the residual is computed."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(96, 4, generator=g) @ torch.randn(4, 128, generator=g) * (1 + torch.arange(96.0))[:, None]
    result = loftq(w, BlockQuantizer(grid(2)), iters=1, low_rank=lambda residual, _: exact_low_rank(residual, 90))
    left = w.double() - dequantize(result.quantized, grid(2)).double() - (result.lora_b @ result.lora_a).double()
    assert result.residual == pytest.approx(float(left.norm() / w.double().norm()), rel=1e-4)


def test_norms_of_any_scale() -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-30, 1e30, 1e-42, 0.0):
        assert frobenius(x * scale) == pytest.approx(float((x * scale).double().norm()), rel=1e-6)
