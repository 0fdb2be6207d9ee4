"""Mixtures of experts in `compressed-tensors`: what stock transformers unpacks into the stacked parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.family_checkpoints import save, saved
from support.loading import load_plainly, place_of

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.errors import UsageError
from loftq_cli.formats.base import DTYPES

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

RECIPE = {"format": "compressed-tensors", "group_size": 32, "rank": 4, "iters": 2}
# One matrix an expert on disk: by itself, beside shared experts and a gate, beside a dense layer of the same names.
LAYOUTS = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")


def check_exact(out: Path, manifest: Manifest, source: Path) -> None:
    """Every matrix through transformers alone, which leaves no key over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        model(torch.arange(8).unsqueeze(0))  # what is still packed is unpacked by the first pass
    for record in manifest.matrices:
        assert torch.equal(place_of(model, record).float(), decode_matrix(out, manifest, record)), record.module
    assert loftq_cli.verify(out, source=source).problems == ()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_unpacks_experts_exactly(name: str, bits: int, tmp_path: Path) -> None:
    source = saved(name).folder
    for dequantize in (True, False):
        out = tmp_path / str(dequantize)
        manifest = loftq_cli.quantize(source, output=out, bits=bits, dequantize=dequantize, **RECIPE)
        experts = [record for record in manifest.matrices if record.expert]
        assert len(experts) == 12 * len({record.parameter.split(".experts")[0] for record in experts}) > 0
        assert not [record for record in manifest.kept if record.kind == "expert"]
        check_exact(out, manifest, source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_half_precision_experts_are_exact(name: str, dtype: str, tmp_path: Path) -> None:
    source = save(FAMILIES[name]().to(DTYPES[dtype]), tmp_path / "source").folder
    manifest = loftq_cli.quantize(source, output=tmp_path / "out", bits=3, **RECIPE)
    assert manifest.dtype == dtype
    check_exact(tmp_path / "out", manifest, source)


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_of_experts_train_and_merge_to_q_plus_ba(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(saved(name).folder, output=out, bits=2, **RECIPE)
    model = load_plainly(out, "AutoModelForCausalLM").train()
    ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = [value for key, value in model.named_parameters() if "lora_" in key]
    assert adapters and all(value.grad is not None and value.grad.abs().sum() > 0 for value in adapters)
    merged = model.merge_and_unload()
    for record in manifest.matrices:
        expected = decode_matrix(out, manifest, record) + decode_product(out, manifest, record)
        assert torch.allclose(place_of(merged, record), expected, atol=1e-6, rtol=0), record.module
        weight = place_of(saved(name).model, record).detach()
        assert float((weight - expected).norm() / weight.norm()) == pytest.approx(record.residual, rel=1e-4)


def test_experts_may_have_a_width_of_their_own(tmp_path: Path) -> None:
    """transformers takes the first group whose pattern says "experts" for theirs; `shared_expert` is none of them."""
    source, out = saved("qwen2_moe").folder, tmp_path / "out"
    rules = [r"mlp\.experts\.=2"]
    manifest = loftq_cli.quantize(source, output=out, bits=4, rule=rules, **RECIPE)
    assert {(record.bits, bool(record.expert)) for record in manifest.matrices} == {(2, True), (4, False)}
    check_exact(out, manifest, source)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    own, others = config["config_groups"].values()
    assert (own["weights"]["num_bits"], others["weights"]["num_bits"], others["targets"]) == (2, 4, ["Linear"])
    patterns = [target.removeprefix("re:") for target in own["targets"]]
    on_disk = {name.removesuffix(".weight") for name in saved("qwen2_moe").shapes}
    hit = {name for name in on_disk if any(re.match(pattern, name) for pattern in patterns)}
    assert hit == {name for name in on_disk if ".mlp.experts." in name} and len(patterns) == 3
    routers = [target.removeprefix("re:") for target in config["ignore"] if target.startswith("re:")]
    left_out = {name for name in on_disk if any(re.match(pattern, name) for pattern in routers)}
    assert left_out == {f"model.layers.{layer}.mlp.gate" for layer in (0, 1)}
    mixed = [*rules, r"self_attn=8"]
    manifest = loftq_cli.quantize(source, output=tmp_path / "mixed", bits=4, rule=mixed, dequantize=False, **RECIPE)
    assert {record.bits for record in manifest.matrices} == {2, 4, 8}
    check_exact(tmp_path / "mixed", manifest, source)


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_experts_in_one_tensor_stay_dense_with_the_reason(name: str, tmp_path: Path) -> None:
    source, out = saved(name).folder, tmp_path / "out"
    with pytest.raises(UsageError, match=r"--experts require asks: compressed-tensors holds one expert at a time"):
        loftq_cli.plan(source, output=out, bits=4, experts="require", **RECIPE)
    plan = loftq_cli.plan(source, output=out, bits=4, **RECIPE)
    assert any("matrices of experts stay in full precision, because compressed-tensors" in note for note in plan.notes)
    manifest = loftq_cli.quantize(source, output=out, bits=4, **RECIPE)
    kept = [record for record in manifest.kept if record.kind == "expert"]
    assert kept and not any(record.expert for record in manifest.matrices)
    assert all("this checkpoint stores all of a layer in one tensor" in record.reason for record in kept if record.rank)
    check_exact(out, manifest, source)
    merged = load_plainly(out, "AutoModelForCausalLM").merge_and_unload()
    for parameter in (key for key in saved(name).model.state_dict() if re.search(r"experts\.\w+_proj$", key)):
        assert torch.equal(merged.get_parameter(parameter), saved(name).model.get_parameter(parameter)), parameter


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"symmetric": False}, r"experts\.0\.w1\.weight does not fit .*: transformers unpacks experts without zero"),
        ({"experts": "keep"}, r"none can stay in full precision as model\.layers\.0\S+experts\.0\.w1\.weight would"),
        ({"rule": [r"layers\.1.*down_proj=dense"]}, r"none can stay in full precision as model\.layers\.1\S+\.w2"),
        ({"exclude": ["*.layers.0.mlp.experts.*"]}, r"none can stay in full precision as model\.layers\.0"),
        ({"rule": [r"layers\.0.*experts=2"]}, "experts at one bit width only"),
        ({"rule": [r"layers\.0.*experts=2"], "dequantize": False}, "experts at one bit width only"),
    ],
)
def test_what_transformers_would_not_load_is_refused_before_any_work(recipe: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        loftq_cli.plan(saved("mixtral").folder, **{"bits": 4, **RECIPE, **recipe})
    assert str(caught.value).count(". ") == 0 and "--format packed" in str(caught.value)


def test_an_expert_with_nan_is_refused_after_reading(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    stored = load_file(saved("mixtral").folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    stored[name].view(-1)[-1] = torch.nan
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((saved("mixtral").folder / "config.json").read_bytes())
    with pytest.raises(UsageError, match="none can stay in full precision"):
        loftq_cli.quantize(source, output=tmp_path / "out", bits=4, allow_nonfinite=True, **RECIPE)
    assert not list((tmp_path / "out").glob("*.safetensors"))
