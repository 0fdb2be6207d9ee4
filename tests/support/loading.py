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


def check_start(path: Path, manifest: Manifest, model, source) -> None:
    """Check that every adapted matrix of the loaded PEFT model is the files' Q + BA, as far from W as recorded.

    Args:
        model: from `load_plainly` or `loftq_cli.load`; `source` is the model that was converted.
    """
    adapted = [record for record in manifest.matrices if record.rank]
    assert {record.parameter or record.module for record in adapted} == _adapted_places(model, manifest)
    for record in adapted:
        w, found = place_of(source, record).detach().float(), effective_weight(model, record)
        expected = decode_matrix(path, manifest, record) + decode_product(path, manifest, record)
        scale = torch.linalg.vector_norm(w)
        assert float(torch.linalg.vector_norm(found - expected) / scale) < 1e-6, f"{record.module} is elsewhere"
        assert float(torch.linalg.vector_norm(w - found) / scale) == pytest.approx(record.residual, rel=1e-4)


def _adapted_places(model, manifest: Manifest) -> set[str]:
    """Return the modules and parameters that PEFT adapts, without those that start at zero over a dense weight."""
    kept = {record.module for record in manifest.kept if record.rank}
    places = set()
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            own = path.replace(".base_layer", "")
            places.add(f"{own}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else own)
    return {place for place in places if place not in kept and place.removesuffix(".weight") not in kept}


def effective_weight(model, record) -> torch.Tensor:
    """Return the matrix [out, in] that a loaded PEFT model multiplies by, Q + scaling · BA, by PEFT's own functions."""
    if not record.parameter:
        layer = model.base_model.model.get_submodule(record.module)
        delta = layer.get_delta_weight("default").detach().float()
        return dense_weight(layer.base_layer) + (delta.T if layer.fan_in_fan_out else delta)
    path, _, name = record.parameter.rpartition(".")
    layer = model.base_model.model.get_submodule(path)
    while layer.parameter_name != name:  # PEFT wraps a module once per parameter
        layer = layer.base_layer
    whole = (layer.get_param() + layer.get_delta_weight("default")).detach().float()
    if record.expert is None:
        return whole
    one = whole[record.expert.index]
    one = one.T if getattr(layer.get_base_layer(), "is_transposed", False) else one
    return one[record.expert.part * record.shape[0] : (record.expert.part + 1) * record.shape[0]]


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
