"""The class that is built, classification without a class, and detection of code that reads weights."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.family_checkpoints import saved
from support.paths import ROOT
from torch import nn

from loftq_cli.modules.keep_rules import ROUTER_CLASS
from loftq_cli.modules.roles import ModuleMap, TensorRole, map_modules
from loftq_cli.modules.weight_reads import ReadKind, direct_weight_reads, weight_reads


def _by_tensor(found: ModuleMap) -> dict[str, TensorRole]:
    return {role.tensor: role for role in found.roles}


def test_infinity_in_a_config_is_parsed() -> None:
    tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 32, "n_groups": 1, "vocab_size": 96}
    config = {"model_type": "mamba2", **tiny, "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert map_modules(config, {}).architecture == "Mamba2Model"


def test_class_is_chosen_as_in_transformers() -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    old = map_modules(config | {"architectures": ["LLaMAForCausalLM"]}, shapes)
    assert old.architecture == "LlamaForCausalLM"
    assert old.notes == ("class LLaMAForCausalLM is unknown to transformers: LlamaForCausalLM is used instead",)

    bare = map_modules({key: value for key, value in config.items() if key != "architectures"}, shapes)
    assert (bare.architecture, bare.task_type) == ("LlamaModel", None)
    assert _by_tensor(bare)["model.layers.0.mlp.up_proj.weight"].module == "layers.0.mlp.up_proj"

    typeless = map_modules({key: value for key, value in config.items() if key != "model_type"}, shapes)
    assert typeless.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("broken", [{"model_type": "llamb"}, {"hidden_size": "many"}])
def test_without_a_class_matrices_are_chosen_by_name_and_shape(broken: dict[str, Any]) -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    extra = {"model.layers.0.mlp.gate.weight": (64, 64), "model.layers.0.mlp.small.weight": (4, 64)}
    found = map_modules(config | broken, shapes | extra)
    assert found.architecture is None and found.task_type == "CAUSAL_LM"
    assert "matrices are chosen by name and shape" in found.notes[0]

    known = map_modules(config, shapes)
    expected = {role.module for role in known.roles if role.kind == "linear"}
    assert {role.module for role in found.roles if role.kind == "linear" and role.keep is None} == expected
    roles = _by_tensor(found)
    assert str(roles["model.embed_tokens.weight"].keep) == "embedding"
    assert str(roles["lm_head.weight"].keep) == "task head"
    assert str(roles["model.layers.0.input_layernorm.weight"].keep) == "normalization"
    assert str(roles["model.layers.0.mlp.gate.weight"].keep) == "router"
    assert str(roles["model.layers.0.mlp.small.weight"].keep) == "smaller than 32"
    assert set(found.linear_modules) == set(known.linear_modules) | {name[:-7] for name in extra}


def test_code_of_the_checkpoint_is_never_imported(tmp_path: Path, monkeypatch: Any) -> None:
    sentinel = tmp_path / "imported"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass EvilForCausalLM: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    remote = {"auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}}
    for change in ({}, {"architectures": ["EvilForCausalLM"]}, {"model_type": "evil"}):
        config = config | remote | change | {"_name_or_path": str(tmp_path)}
        map_modules(config, shapes)
    assert not sentinel.exists() and "modeling_evil" not in sys.modules


def test_only_model_classes_of_transformers_are_built() -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    found = map_modules(config | {"architectures": ["Trainer"]}, shapes)
    assert found.architecture == "LlamaModel" and "class Trainer is unknown" in found.notes[0]


def test_loading_settings_do_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    settings = {
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "torch_dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
    }
    assert map_modules(config | settings, shapes) == map_modules(config, shapes)
    assert torch.get_default_dtype() == torch.float32 and not caplog.records


@pytest.mark.parametrize("name", ["vit", "mixtral", "llava"])
def test_order_and_earlier_calls_do_not_matter(name: str) -> None:
    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    first = map_modules(config, shapes)
    backwards = map_modules(config, dict(reversed(shapes.items())))
    assert backwards.roles == tuple(reversed(first.roles)) and map_modules(config, shapes) == first


def test_semi_public_functions_of_transformers() -> None:
    """If this fails, `modules/names.py` must be adapted; PEFT uses the same functions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    assert next(iter(inspect.signature(get_model_conversion_mapping).parameters)) == "model"
    expected = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert list(inspect.signature(rename_source_key).parameters)[:5] == expected
    renaming = WeightRenaming("a.b", "c.d")
    converter = WeightConverter(["e.*.f"], "e.g", [transformers.core_model_loading.MergeModulelist(dim=0)])
    assert rename_source_key("a.b.x", [renaming], [converter], "", {}) == ("c.d.x", None)
    assert rename_source_key("e.0.f", [renaming], [converter], "", {}) == ("e.g", "e.*.f")
    assert sorted(["a.10", "a.9"], key=dot_natural_key) == ["a.9", "a.10"]


def test_without_those_functions_names_are_matched_literally(monkeypatch: Any) -> None:
    checkpoint = saved("bert")
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    config, shapes = checkpoint.config, checkpoint.shapes
    found = map_modules(config | {"architectures": ["BertForMaskedLM"]}, shapes)
    assert "conversion mapping was not found" in found.notes[0]
    role = _by_tensor(found)["encoder.layer.0.output.dense.weight"]
    assert role.module == "bert.encoder.layer.0.output.dense"


def test_weight_reads_follow_the_source() -> None:
    assert ("out_proj",) in weight_reads(nn.MultiheadAttention)
    assert {("linear1",), ("self_attn", "out_proj")} <= weight_reads(nn.TransformerEncoderLayer)
    assert weight_reads(nn.Linear) == frozenset()
    layer = nn.TransformerEncoderLayer(8, 2)
    assert direct_weight_reads(layer, None)["self_attn.out_proj"] in ("TransformerEncoderLayer", "MultiheadAttention")


def test_reads_of_a_dtype_and_reads_without_a_quantizer_are_told_apart() -> None:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    assert weight_reads(T5DenseGatedActDense) == weight_reads(T5DenseGatedActDense, ReadKind.DTYPE) == {("wo",)}
    assert weight_reads(JambaMambaMixer, ReadKind.UNQUANTIZED) == {("dt_proj",)}
    assert ("dt_proj",) not in weight_reads(JambaMambaMixer, ReadKind.VALUES)
    # This class passes the weight to its fused kernel as well.
    assert ("dt_proj",) in weight_reads(FalconMambaMixer, ReadKind.VALUES)


def test_reads_behind_a_switch_count_when_it_is_on() -> None:
    checkpoint = saved("bloom")
    config, shapes = checkpoint.config, checkpoint.shapes
    tensor = "transformer.h.0.mlp.dense_4h_to_h.weight"
    assert _by_tensor(map_modules(config, shapes))[tensor].keep is None
    exact = _by_tensor(map_modules(config | {"slow_but_exact": True}, shapes))[tensor]
    assert str(exact.keep) == "its weight is read directly by BloomMLP"


def test_importing_the_module_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, loftq_cli.modules.roles; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("class_name", "routes"),
    [
        ("MixtralTopKRouter", True),
        ("ZayaRouterMLP", True),
        ("HunYuanMoEV1Gate", True),
        ("Qwen3_5MoeGatedDeltaNet", False),
        ("DFineGate", False),
    ],
)
def test_a_gate_is_a_router_only_between_experts(class_name: str, routes: bool) -> None:
    assert bool(ROUTER_CLASS.search(class_name)) == routes
