"""Load converted models with their real loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import Manifest


def place_of(model, record) -> torch.Tensor:
    """Return the view of the model's weight that contains a matrix [out, in]."""
    expert = record.expert
    if expert is None:
        weight = model.get_submodule(record.module).weight
        return weight.T if record.kind == "conv1d" else weight
    stacked = model.get_parameter(record.parameter)
    experts = model.get_submodule(record.parameter.rpartition(".")[0])
    one = stacked[expert.index].T if getattr(experts, "is_transposed", False) else stacked[expert.index]
    return one[expert.part * record.shape[0] : (expert.part + 1) * record.shape[0]]


def source_weights(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def load_plainly(path: Path, auto: str):
    """Load backbone and adapter with transformers and PEFT, and check that no key is missing or unexpected."""
    import transformers
    from peft import PeftModel

    import loftq_cli.runtime  # noqa: F401

    backbone, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True)
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    model = PeftModel.from_pretrained(backbone, path, subfolder="loftq_init", is_trainable=True)
    stored = load_file(path / "loftq_init" / "adapter_model.safetensors")
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    return model


def check_matrices(path: Path, manifest: Manifest, model, weights: dict[str, torch.Tensor]) -> None:
    """Check that the loaded Q is the decoded one, that recorded residuals are true, and that LoftQ beats plain."""
    for record in manifest.matrices:
        w = weights[record.tensor].float()
        q = decode_matrix(path, manifest, record)
        layer = model.base_model.model.get_submodule(record.module)
        assert torch.equal(dense_weight(layer.base_layer), q), record.module
        assert layer.scaling["default"] == 1.0
        left = torch.linalg.vector_norm(w - q - decode_product(path, manifest, record)) / torch.linalg.vector_norm(w)
        assert float(left) == pytest.approx(record.residual, rel=1e-4)
        assert record.residual < record.plain_residual
        assert float(left) < float(torch.linalg.vector_norm(w - q) / torch.linalg.vector_norm(w))


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """Return the matrix that a loaded layer multiplies by, [out, in]."""
    if hasattr(module, "dequantized_weight"):
        return module.dequantized_weight().float()
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional as functional

        return functional.dequantize_4bit(module.weight.data, state).float()
    weight = module.weight.detach().float()
    return weight.T if type(module).__name__ == "Conv1D" else weight
