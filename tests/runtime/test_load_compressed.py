"""Loading what `--compressed` wrote: packed layers serve, and an adapter needs them unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.errors import LoftqError

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("rule", [(), ("v_proj=2",)], ids=["one width", "two widths"])
def test_an_adapter_over_packed_compressed_tensors_is_one_sentence(
    rule: tuple[str, ...], random_llama: Path, tmp_path: Path
) -> None:
    """`--compressed` keeps layers packed, which PEFT cannot adapt; unpacked they are exact, but only at one width."""
    from transformers import CompressedTensorsConfig

    recipe = {"bits": 4, "rank": 4, "iters": 1, "format": "compressed-tensors", "group_size": 32, "rule": rule}
    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", dequantize=False, **recipe)
    with pytest.raises(LoftqError, match="PEFT adapts unpacked layers only: ") as caught:
        loftq_cli.load(tmp_path / "out")
    said = "convert with --format packed" if rule else "pass quantization_config=transformers.CompressedTensorsConfig("
    assert said in str(caught.value) and "adapter=False" in str(caught.value)
    assert loftq_cli.load(tmp_path / "out", adapter=False)(IDS).logits.isfinite().all()
    unpacked = CompressedTensorsConfig(dequantize=True)
    if rule:
        for adapter in (True, False):
            with pytest.raises(LoftqError, match="as if they were the same"):
                loftq_cli.load(tmp_path / "out", adapter=adapter, quantization_config=unpacked)
        return
    model = loftq_cli.load(tmp_path / "out", trainable=True, quantization_config=unpacked)
    for record in manifest.matrices:
        weight = model.get_base_model().get_submodule(record.module).get_base_layer().weight
        assert torch.equal(weight, loftq_cli.decode(tmp_path / "out", record.module))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if "lora_" in key)
