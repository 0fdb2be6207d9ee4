"""The compiled block quantizer against its plain-torch twin, and the fallback if nothing can be compiled."""

from __future__ import annotations

import itertools
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
from loftq_cli.numerics.grids.blocks import BlockGrid, midpoints
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import dequantize
from loftq_cli.numerics.lowrank.truncate import exact_low_rank
from loftq_cli.numerics.methods.loftq import exact_step, loftq
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.protocols import FusedQuantizer, QuantizeStep, Scratch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOOKS = [("nf", 2), ("nf", 3), ("nf", 4), ("nf-sym", 3), ("uniform", 2), ("uniform", 4), ("uniform", 8)]


def grid(bits: int = 2, data_type: str = "nf", **changes: object) -> BlockGrid:
    settings: dict = {"block_size": 64, "layout": "rows", "scale_dtype": F32, "value_dtype": F32, **changes}
    return BlockGrid(codebook(data_type, bits), **settings)


def matrices(levels: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Return cases that are hard to round: ties, signed zeros, denormals, both ends of float32, mixed magnitudes."""
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
def test_target_computed_in_the_kernel(layout: str, half: bool) -> None:
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


def test_plain_torch_is_the_fallback_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loftq_cli.kernels.cpu.block_quantizer", None)  # as if numba were missing
    kernels._compiled_quantizers.cache_clear()
    try:
        with pytest.warns(UserWarning, match="using plain torch instead"):
            assert isinstance(block_quantizer(grid(2), "cpu"), BlockQuantizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(block_quantizer(grid(4), "cpu"), BlockQuantizer)
    finally:
        kernels._compiled_quantizers.cache_clear()


@pytest.mark.parametrize("writable", [True, False])
def test_works_without_a_cache_for_machine_code(writable: bool, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("shape", [(64, 256), (33, 100), (5, 70), (1, 1), (300, 48)])
def test_compiled_quantizer_is_its_plain_twin(layout: str, shape: tuple[int, int]) -> None:
    """Codes, scales and residuals bit for bit, for every codebook and dtype, ties and extremes among the values."""
    torch.manual_seed(0)
    target, w = torch.randn(shape), torch.randn(shape)
    flat = target.view(-1)
    specials = torch.tensor([0.0, -0.0, 1e-45, 1e-30, 65504.0, 1e30, 0.5, -0.5])[: flat.numel()]
    flat[: len(specials)] = specials
    for bits, data_type in itertools.product((2, 3, 4, 8), ("nf", "nf-sym", "uniform")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for block_size in (32, 64, 256):
                kind = BlockGrid(codebook(data_type, bits), block_size, layout, dtype, dtype)
                plain = BlockQuantizer(kind).quantize_residual(w, target)
                fast = block_quantizer(kind, "cpu").quantize_residual(w, target)
                assert torch.equal(fast.quantized.codes, plain.quantized.codes)
                assert torch.equal(fast.quantized.absmax, plain.quantized.absmax)
                assert torch.equal(fast.residual, plain.residual)
                assert fast.residual_norm() == pytest.approx(plain.residual_norm(), rel=1e-6)


def test_the_compiled_quantizer_is_the_one_that_runs() -> None:
    assert type(block_quantizer(grid(2), "cpu")).__name__ == "CompiledQuantizer"


def test_without_the_compiler_plain_torch_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [name for name in sys.modules if name.startswith("loftq_cli.kernels.cpu")]:  # to import them again
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "cpu", raising=False)
    kernels._compiled_quantizers.cache_clear()
    try:
        with pytest.warns(UserWarning, match="using plain torch instead"):
            assert isinstance(kernels.block_quantizer(grid(2), "cpu"), BlockQuantizer)
    finally:
        kernels._compiled_quantizers.cache_clear()
