"""Products are float32's whatever the caller asked torch for, and the caller's wish is kept for afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.interruptions import RECIPE, tensors

import loftq_cli
from loftq_cli.machine.precision import full_precision

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_old_way_to_ask(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    sums = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(KeyError), full_precision():
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        raise KeyError
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == sums


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch knows only the old way"
)
def test_the_new_way_to_ask() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_the_same_bytes_whatever_was_asked(random_llama: Path, tmp_path: Path) -> None:
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        loftq_cli.quantize(random_llama, output=tmp_path / precision, **RECIPE)
        assert torch.get_float32_matmul_precision() == precision
    assert tensors(tmp_path / "medium") == tensors(tmp_path / "highest")


def test_what_torch_cannot_undo_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="NVIDIA_TF32_OVERRIDE=1 .*: unset it"), full_precision():
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_gpu_too() -> None:
    torch.set_float32_matmul_precision("high")
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).unbind()
    with full_precision():
        found = (left.to(GPU) @ right.to(GPU)).cpu()
    assert (found - left.double() @ right.double()).abs().max() < 1e-3
