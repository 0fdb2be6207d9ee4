"""The Triton quantizer: results in Triton's interpreter, machine code compiled without a GPU, results on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import triton_cases, triton_group_cases
from support.paths import TESTS

from loftq_cli import kernels
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.integer import AffineQuantizer

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@needs_triton
def test_interpreted_kernels_are_the_plain_twin_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "support.triton_cases"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["failures"] and found["cases"] > 350


VARIANTS: dict[str, dict[str, Any]] = {
    "nf2 rows": {"bits": 2},
    "nf4 flat, short, bfloat16": {"bits": 4, "divides_short": True, "value_kind": 1},
    "8 bits, long blocks, float16": {"bits": 8, "block": 4096, "scale_kind": 2, "value_kind": 2},
    "corrected": {"bits": 3, "corrects": 1},
    "corrected in halves": {"bits": 2, "corrects": 2, "halves": True, "scale_kind": 1, "value_kind": 1},
}
PLACES = dict.fromkeys(("n_blocks", "row", "blocks_per_row"), "i32")


def machine_code(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], architecture: int, warps: int
) -> str:
    """Return the PTX of a kernel, after assembling it for an NVIDIA architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, {**arguments, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def assert_exact(ptx: str) -> None:
    inexact = re.findall(r"(?:(?:fma|mad)\.\S*f(?:32|64)|div\.full\S*|\S+\.approx\S*|\S+\.ftz\S*)", ptx)
    assert not inexact, f"torch rounds these differently: {sorted(set(inexact))}"


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantizer_compiles_to_exact_arithmetic(
    variant: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from loftq_cli.kernels.gpu.blocks import quantize_blocks

    block = VARIANTS[variant].get("block", 64)
    constants = {
        "block": block, "width": block, "count": max(1, 2048 // block), "divides_short": False,
        "scale_kind": 0, "value_kind": 0, "corrects": 0, "halves": False, **VARIANTS[variant],
    }  # fmt: skip
    arrays = PLACES | dict.fromkeys(("weight", "target", "absmax", "residual", "middles", "levels"), "*fp32")
    arrays |= {"codes": "*u8", "sums": "*fp64"}
    arrays |= {"target": "*i16", "residual": "*i16"} if constants["halves"] else {}
    ptx = machine_code(quantize_blocks, arrays, constants, architecture, warps=max(4, block // 512))
    assert_exact(ptx)
    assert "div.rn.f32" in ptx


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
def test_restoring_compiles_to_exact_arithmetic(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from loftq_cli.kernels.gpu.blocks import restore_blocks

    arrays = PLACES | dict.fromkeys(("weight", "absmax", "residual", "levels"), "*fp32") | {"codes": "*u8"}
    constants = {"block": 64, "width": 64, "count": 32, "value_kind": 0}
    assert_exact(machine_code(restore_blocks, arrays, constants, architecture, warps=4))


@needs_triton
@pytest.mark.parametrize(("rule", "architecture"), [(2, 80), (0, 90), (2, 90), (3, 90)])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_groups_compile_to_exact_arithmetic(
    rule: int, zero: int, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from loftq_cli.kernels.gpu.integers import quantize_groups

    constants = {
        "top": 3.0, "least_zero": 0.0, "count": 16, "zero": zero, "rule": rule, "scale_kind": 2, "offset_kind": 1,
        "product_kind": 0, "value_kind": 0, "corrects": rule == 2, "halves": architecture == 80,
    }  # fmt: skip
    arrays = dict.fromkeys(("weight", "product", "scales", "zeros", "residual", "shares"), "*fp32")
    arrays |= {"codes": "*u8", "sums": "*fp64"} | ({"residual": "*i16"} if constants["halves"] else {})
    sizes = ("n_groups", "n_in", "groups_per_row", "group_width", "n_shares", "n_refits")
    assert_exact(machine_code(quantize_groups, arrays | dict.fromkeys(sizes, "i32"), constants, architecture, warps=1))


@needs_triton
@needs_gpu
def test_gpu_computes_the_plain_twins_bits() -> None:
    failures = []
    for name, check in triton_cases.cases("cuda"):
        try:
            check()
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures
    found = [type(block_quantizer(g, "cuda")).__name__ for g in (triton_cases.grid(), triton_group_cases.groups())]
    assert found == ["TritonQuantizer", "TritonAffineQuantizer"]


@pytest.mark.parametrize("grid", [triton_cases.grid(), triton_group_cases.groups()], ids=["blocks", "groups"])
def test_plain_torch_is_the_fallback_with_one_warning(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpu", "gpu_groups"):
        monkeypatch.setitem(sys.modules, f"loftq_cli.kernels.{name}", None)  # as if Triton were missing
    caches = kernels._blocks_on_gpu, kernels._groups_on_gpu
    for cached in caches:
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"the Triton .* on cuda is not available .* using plain torch instead"):
            assert isinstance(block_quantizer(grid, "cuda"), (BlockQuantizer, AffineQuantizer))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(block_quantizer(grid, "cuda"), (BlockQuantizer, AffineQuantizer))
    finally:
        for cached in caches:
            cached.cache_clear()


def test_nested_scales_use_plain_torch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nested = triton_cases.grid("nf", 4, layout="flat", nested=True)
        assert isinstance(block_quantizer(nested, "cuda"), BlockQuantizer)


def test_triton_is_imported_only_for_a_gpu() -> None:
    code = (
        "import sys, loftq_cli.kernels as k; from support import triton_cases\n"
        "k.block_quantizer(triton_cases.grid(), 'cpu')\n"
        "sys.exit('triton' in sys.modules)"
    )
    path = os.pathsep.join([str(TESTS), *sys.path])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
