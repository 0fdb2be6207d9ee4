"""Weights that stay in full precision: named in skip lists, kept in float32, chosen with --include, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.family_checkpoints import saved
from torch import Tensor

import loftq_cli
from loftq_cli.errors import LoftqError

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
_SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
_IMAGE = {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4 MoE with a layer for multi-token prediction that transformers ignores."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe")
    config = transformers.Glm4MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        pad_token_id=0,
    )
    model = transformers.Glm4MoeForCausalLM(config)
    model.get_buffer(BIAS).copy_(7.123456 + 1e-3 * torch.randn(4))
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): value.clone() for name, value in state.items() if "s.1." in name}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    save_file(state | extra, folder / "model.safetensors", {"format": "pt"})
    return folder


def matches(entry: str, module: str) -> bool:
    """True if transformers or a serving engine applies the entry of a skip list to the module."""
    if entry.startswith(("re:", "^")):
        return re.match(entry.removeprefix("re:"), module) is not None
    return module == entry or module.endswith(f".{entry}")


@pytest.mark.parametrize(
    ("form", "field"), [("compressed-tensors", "ignore"), ("bnb", "llm_int8_skip_modules")], ids=["ct", "bnb"]
)
def test_skip_lists_name_every_kept_matrix_and_no_other(form: str, field: str, moe: Path, tmp_path: Path) -> None:
    plan = loftq_cli.plan(moe, output=tmp_path / "out", bits=4, rank=8, format=form)
    entries = json.loads(plan.texts["config.json"])["quantization_config"][field]
    kept = [
        unit.tensor.removesuffix(".weight")
        for unit in plan.kept
        if re.search(r"(proj|gate|head)\.weight$", unit.tensor)
    ]
    assert "model.layers.2.eh_proj" in kept and "model.layers.2.mlp.experts.3.down_proj" in kept
    assert [name for name in kept if not any(matches(entry, name) for entry in entries)] == []
    packed = {name for unit in plan.matrices for name in (unit.module, unit.tensor.removesuffix(".weight"))}
    assert [name for name in packed if any(matches(entry, name) for entry in entries)] == []


def test_float32_lists_hold_whatever_dtype_is_asked(moe: Path, tmp_path: Path) -> None:
    stored = load_file(moe / "model.safetensors")[BIAS]
    cast = tmp_path / "cast"
    loftq_cli.quantize(moe, output=cast, bits=4, rank=8, format="dense", dtype="bfloat16")
    found = load_file(cast / "model.safetensors")
    assert torch.equal(found[BIAS], stored) and found[BIAS].dtype is torch.float32
    assert found["model.norm.weight"].dtype is torch.bfloat16
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    loftq_cli.quantize(moe, output=plain, bits=4, rank=8, format="dense")
    loftq_cli.merge(plain, plain / "loftq_init", output=merged, dtype="bfloat16")
    found = load_file(merged / "model.safetensors")
    assert torch.equal(found[BIAS], stored) and found["model.norm.weight"].dtype is torch.bfloat16


def changed(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of a checkpoint with other values."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / "model.safetensors") | tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("form", ["dense", "packed", "bnb"])
def test_a_value_that_overflows_float16_is_refused_by_name(tensor: str, form: str, tmp_path: Path) -> None:
    llama = saved("llama").folder
    value = load_file(llama / "model.safetensors")[tensor].clone()
    value.view(-1)[3] = 70000.0
    source = changed(llama, tmp_path / "source", {tensor: value})
    with pytest.raises(LoftqError, match=rf"{tensor}.* holds numbers up to 7e\+04, which float16 cannot represent"):
        loftq_cli.quantize(source, output=tmp_path / "out", bits=4, rank=8, format=form, dtype="float16")
    loftq_cli.quantize(source, output=tmp_path / "wide", bits=4, rank=8, format=form, dtype="bfloat16")


def test_include_reaches_layers_outside_the_base_model(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        **_SIZES,
        **_IMAGE,
        decoder_num_attention_heads=4,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=128,
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path / "source")
    plan = loftq_cli.plan(tmp_path / "source", include=("decoder.decoder_layers.*",))
    modules = {unit.module for unit in plan.matrices}
    assert len(modules) == 12 and all(module.startswith("decoder.decoder_layers.") for module in modules)
    usual = {unit.module for unit in loftq_cli.plan(tmp_path / "source").matrices}
    assert usual and not any(module.startswith("decoder.") for module in usual)


def test_a_head_that_is_included_is_answered_with_the_reason() -> None:
    source = saved("bert_classifier").folder
    with pytest.raises(LoftqError, match=r"left to quantize \(--include 'classifier' names only: task head\)"):
        loftq_cli.plan(source, include=("classifier",))
    notes = loftq_cli.plan(source, include=("classifier", "*.query")).notes
    assert "--include 'classifier' names only weights that stay in full precision: task head." in notes


def test_names_of_labels_count_nothing(tmp_path: Path) -> None:
    names = {number: f"class {number}" for number in range(5950)}
    names |= {5321: "record player", 5800: "building blocks", 5900: "backstage", 5901: "num_layers"}
    config = transformers.ViTConfig(
        **_SIZES, **_IMAGE, id2label=names, label2id={name: number for number, name in names.items()}
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "source")
    assert loftq_cli.plan(tmp_path / "source").matrices


def test_a_matrix_that_gptq_cannot_hold_stays_in_full_precision(tmp_path: Path) -> None:
    config = transformers.Qwen3_5TextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
    )
    transformers.Qwen3_5ForCausalLM(config).save_pretrained(tmp_path / "source")
    plan = loftq_cli.plan(tmp_path / "source", bits=4, rank=8, format="gptq")
    kept = {unit.module: str(unit.reason) for unit in plan.kept if unit.target}
    names = {f"model.layers.{layer}.linear_attn.in_proj_{part}" for layer in range(3) for part in "ab"}
    assert kept == dict.fromkeys(names, "words of gptq need multiples of 32 rows and columns")
    listed = json.loads(plan.texts["config.json"])["quantization_config"]["modules_in_block_to_quantize"][0]
    assert not any(module.endswith(entry) for entry in listed for module in names)


@pytest.mark.parametrize("place", ["model.layers.2", "mtp.layers.0"])
def test_gptq_lists_the_quantized_modules_if_a_layer_for_prediction_is_kept(place: str, tmp_path: Path) -> None:
    """Serving engines take every linear layer that ends in a listed path for a quantized one, or all without a list."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SIZES | {"num_hidden_layers": 2}, vocab_size=96, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    extra = {name.replace("model.layers.1", place): value.clone() for name, value in state.items() if "s.1." in name}
    for tensors, listed in ((state, False), (state | extra, True)):
        save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        plan = loftq_cli.plan(tmp_path / "model", output=tmp_path / "out", bits=4, rank=8, format="gptq", group_size=32)
        settings = json.loads(plan.texts["config.json"])["quantization_config"]
        assert ("modules_in_block_to_quantize" in settings) == listed
        if listed:
            kept = [unit.tensor.removesuffix(".weight") for unit in plan.kept if unit.tensor.startswith(place)]
            assert f"{place}.mlp.down_proj" in kept
            entries = settings["modules_in_block_to_quantize"][0]
            assert [name for name in kept if any(name.endswith(entry) for entry in entries)] == []
            assert all(any(unit.module.endswith(entry) for entry in entries) for unit in plan.matrices)
