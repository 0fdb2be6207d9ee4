"""Mixtures of experts: the running model computes with every expert's Q + BA, in every container."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import loftq, sentence
from support.families import FAMILIES
from support.family_checkpoints import saved
from support.hub_server import HubServer
from support.interruptions import StopAfter, tensors
from support.loading import load_plainly, place_of

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.progress import Reporter
from loftq_cli.runtime import LoftqLinear
from loftq_cli.tensorfile.tensors import OutputTensor

RECIPE = {"bits": 2, "rank": 4, "iters": 2}
# One matrix per expert; the same with shared experts and dense MLPs of the same names; one 3-D tensor, transposed.
LAYOUTS = ("mixtral", "deepseek_v3", "gpt_oss")


def approximation(out: Path, manifest: Manifest, record) -> torch.Tensor:
    return decode_matrix(out, manifest, record) + decode_product(out, manifest, record)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_merged_experts_are_q_plus_ba(name: str, form: str, tmp_path: Path) -> None:
    source = saved(name)
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(source.folder, output=out, format=form, **RECIPE)
    experts = [record for record in manifest.matrices if record.expert]
    model = load_plainly(out, "AutoModelForCausalLM")
    if form == "packed":
        model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    assert len(experts) == (8 if name == "gpt_oss" else 12) * len({r.parameter.split(".experts")[0] for r in experts})
    for record in manifest.matrices:
        expected, weight = approximation(out, manifest, record), place_of(source.model, record).float()
        assert torch.allclose(place_of(merged, record), expected, atol=1e-6, rtol=0), record.module
        residual = float((weight - expected).norm() / weight.norm())
        assert residual == pytest.approx(record.residual, rel=1e-4) and record.residual < record.plain_residual
        assert record.rank == 4 and len(record.residuals) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_stopped_and_sharded_runs_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    recipe = {**RECIPE, "max_shard_size": "25KB"}
    source = saved(name).folder
    loftq_cli.quantize(source, output=tmp_path / "whole", **recipe)
    out = tmp_path / "out"
    for units in (3, 9):
        with pytest.raises(RuntimeError, match="stopped by the test"):
            loftq_cli.quantize(source, output=out, reporter=StopAfter(units), **recipe)
    taken_up: list[str] = []

    class Watch(Reporter):
        def working(self, unit) -> None:
            taken_up.append(unit.tensor)

    manifest = loftq_cli.quantize(source, output=out, reporter=Watch(), **recipe)
    assert len(taken_up) < len(manifest.matrices) + len(manifest.kept) - 9
    assert tensors(out) == tensors(tmp_path / "whole") and len(tensors(out)) > 3
    assert not list(out.rglob("scratch*"))
    one = loftq_cli.quantize(source, output=tmp_path / "one", **RECIPE)
    assert [record.residual for record in one.matrices] == [record.residual for record in manifest.matrices]
    assert not [
        key for key in load_plainly(out, "AutoModelForCausalLM").state_dict() if "absmax" in key and "exp" in key
    ]


def test_a_stop_while_adapters_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import loftq_cli.engine.compute.join_adapters as joining

    source = saved("mixtral").folder
    loftq_cli.quantize(source, output=tmp_path / "whole", **RECIPE)
    calls = []

    def broken(joint: OutputTensor, *rest: object) -> int:
        calls.append(joint)
        if len(calls) == 3:
            raise RuntimeError("stopped by the test")
        return real(joint, *rest)

    real = joining._join_part
    monkeypatch.setattr(joining, "_join_part", broken)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        loftq_cli.quantize(source, output=tmp_path / "out", **RECIPE)
    monkeypatch.setattr(joining, "_join_part", real)
    monkeypatch.setattr(joining, "_ROWS_BYTES", 1000)  # processing a few rows at a time changes nothing
    loftq_cli.quantize(source, output=tmp_path / "out", **RECIPE)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")


@pytest.mark.parametrize("name", LAYOUTS)
def test_alpha_keeps_every_expert_where_it_was(name: str, tmp_path: Path) -> None:
    source = saved(name).folder
    one = loftq_cli.quantize(source, output=tmp_path / "one", format="dense", **RECIPE)
    other = loftq_cli.quantize(source, output=tmp_path / "other", format="dense", alpha=16, **RECIPE)
    merged = load_plainly(tmp_path / "other", "AutoModelForCausalLM").merge_and_unload()
    for record, again in zip(one.matrices, other.matrices):
        expected = approximation(tmp_path / "one", one, record)
        assert torch.allclose(approximation(tmp_path / "other", other, again), expected, atol=1e-6)
        assert torch.allclose(place_of(merged, record), expected, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_training_step_reaches_every_expert_adapter(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(saved(name).folder, output=out, **RECIPE)
    model = load_plainly(out, "AutoModelForCausalLM").train()
    ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {key: value for key, value in model.named_parameters() if "lora_" in key}
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in adapters.values())
    assert all(value.requires_grad == (key in adapters) for key, value in model.named_parameters())


def test_shared_experts_and_dense_layers_are_adapted_beside_experts(tmp_path: Path) -> None:
    """PEFT would treat adapters on modules of these names as adapters on the experts."""
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(saved("deepseek_v3").folder, output=out, **RECIPE)
    config = json.loads((out / "loftq_init" / "adapter_config.json").read_text())
    beside = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight"}
    assert beside <= set(config["target_parameters"])
    assert not any(target.endswith(("gate_proj", "up_proj", "down_proj")) for target in config["target_modules"])
    assert config["rank_pattern"] == {"model.layers.1.mlp.experts.gate_up_proj": 8}
    quantized = {record.module for record in manifest.matrices}
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.down_proj"} <= quantized
    model = load_plainly(out, "AutoModelForCausalLM").get_base_model()
    assert isinstance(model.model.layers[0].self_attn.o_proj.base_layer, LoftqLinear)
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.float32


def test_bnb_keeps_experts_with_a_reason_or_stops(tmp_path: Path) -> None:
    source = saved("mixtral").folder
    with pytest.raises(
        UsageError, match=r"w1.weight cannot be quantized as --experts require asks: bnb cannot hold experts"
    ):
        loftq_cli.plan(source, output=tmp_path / "out", bits=4, format="bnb", experts="require")
    plan = loftq_cli.plan(source, output=tmp_path / "out", bits=4, format="bnb")
    assert any("24 matrices of experts stay in full precision" in note for note in plan.notes)
    assert {str(unit.reason) for unit in plan.kept if unit.kind == "expert"} == {
        "bnb cannot hold experts, which transformers stacks in one parameter"
    }
    assert loftq_cli.plan(source, output=tmp_path / "out", bits=4).recipe.format == "packed"
    kept = loftq_cli.plan(source, output=tmp_path / "out", bits=4, experts="keep")
    assert kept.recipe.format == "bnb" and {str(u.reason) for u in kept.kept if u.kind == "expert"} == {
        "expert (--experts keep)"
    }


def test_a_model_that_bitsandbytes_would_be_given_otherwise_is_refused(tmp_path: Path) -> None:
    """transformers loads Llama 4's experts as single layers if bitsandbytes is to quantize them."""
    source = saved("llama4").folder
    with pytest.raises(UsageError, match="transformers builds Llama4ForCausalLM with other modules for bitsandbytes"):
        loftq_cli.plan(source, output=tmp_path / "out", bits=4, format="bnb")
    kept = loftq_cli.plan(source, output=tmp_path / "out", bits=4, experts="keep")
    assert kept.recipe.format == "packed"


def test_the_plan_says_that_packed_experts_are_dense_in_memory(tmp_path: Path) -> None:
    plan = loftq_cli.plan(saved("gpt_oss").folder, output=tmp_path / "out", bits=2)
    assert any(note.startswith("16 matrices of experts are packed on disk and dequantized") for note in plan.notes)
    assert plan.adapter_bytes == sum(file.nbytes - len(file.header) for file in plan.files if "init" in file.name)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rules_go_by_the_stacked_parameter(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rules = [r"layers\.0\.mlp\.experts\.down_proj=4:8", r"layers\.0.*gate_up=skip", r"layers\.1.*gate_up=dense"]
    manifest = loftq_cli.quantize(saved(name).folder, output=out, rule=rules, **RECIPE)
    experts = [record for record in manifest.matrices if record.expert]
    widths = {(record.parameter.split("layers.")[1][0], record.bits, record.rank) for record in experts}
    assert widths == {("0", 4, 8), ("1", 2, 4)} and {re.sub(r".*\.", "", r.parameter) for r in experts} == {"down_proj"}
    kept = {(record.rank, record.reason) for record in manifest.kept if record.kind == "expert"}
    assert {rank for rank, _ in kept} == {0, 4}
    merged = load_plainly(out, "AutoModelForCausalLM")
    merged.get_base_model().dequantize()
    merged = merged.merge_and_unload()
    for record in experts:
        assert torch.allclose(place_of(merged, record), approximation(out, manifest, record), atol=1e-6)
    for layer in (0, 1):  # skipped, and with an adapter that starts at zero
        path = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        assert torch.equal(merged.get_parameter(path), saved(name).model.get_parameter(path))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_loaded_model_is_saved_as_it_stands_in_memory(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    loftq_cli.quantize(saved(name).folder, output=tmp_path / "out", **RECIPE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    one, other = model.state_dict(), again.state_dict()
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", LAYOUTS)
def test_load_as_the_base_model_and_in_another_dtype(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(saved(name).folder, output=out, **RECIPE)
    base = loftq_cli.load(out, auto_class="AutoModel", adapter=False, dtype=torch.bfloat16)
    for record in manifest.matrices:
        if record.expert:
            moved = dataclasses.replace(record, parameter=record.parameter.removeprefix("model."))
            assert torch.equal(place_of(base, moved), decode_matrix(out, manifest, record).bfloat16())
    adapted = loftq_cli.load(out, auto_class="AutoModel")
    whole = loftq_cli.load(out)
    given = {key.replace("model.model.model.", "model.model."): value for key, value in whole.named_parameters()}
    assert all(torch.equal(value, given[key]) for key, value in adapted.named_parameters())
    assert sum("lora_" in key for key in given) == sum("lora_" in key for key, _ in adapted.named_parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_bytes_from_a_pickle_and_from_the_hub(
    name: str,
    tmp_path: Path,
    hub: HubServer,
) -> None:
    source = saved(name).folder
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub.add("org/mixture", files)
    (tmp_path / "bin").mkdir()
    torch.save(load_file(source / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes(files["config.json"])
    loftq_cli.quantize(source, output=tmp_path / "one", **RECIPE)
    loftq_cli.quantize(tmp_path / "bin", output=tmp_path / "two", **RECIPE)
    loftq_cli.quantize("org/mixture", output=tmp_path / "three", stream=True, **RECIPE)
    # The Hub's commit is part of the recipe, and so of the fingerprint in the headers.
    one, three = (
        {
            file: load_file(tmp_path / run / file)
            for file in ("model.safetensors", "loftq_init/adapter_model.safetensors")
        }
        for run in ("one", "three")
    )
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two")
    for file, stored in one.items():
        assert set(stored) == set(three[file]) and all(torch.equal(stored[key], three[file][key]) for key in stored)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", ["packed", "bnb"])
def test_experts_are_verified_against_the_source(name: str, form: str, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(saved(name).folder, output=tmp_path / "out", format=form, **RECIPE)
    found = loftq_cli.verify(tmp_path / "out", source=saved(name).folder)
    assert found.ok and found.matrices == len(manifest.matrices) and found.kept == len(manifest.kept), found.problems
    assert any(record.kind == "expert" for record in (manifest.kept if form == "bnb" else manifest.matrices))


@pytest.mark.parametrize(
    ("name", "tensor", "kept"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", 8),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", 1),
    ],
)
def test_an_expert_with_nan_keeps_its_layers_parameter_dense(name: str, tensor: str, kept: int, tmp_path: Path) -> None:
    stored = load_file(saved(name).folder / "model.safetensors")
    stored[tensor].view(-1)[-1] = torch.nan
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved(name).folder / "config.json").read_bytes())
    with pytest.raises(LoftqError, match="holds nan at"):
        loftq_cli.quantize(tmp_path, output=tmp_path.parent / f"{name}-stops", **RECIPE)
    out = tmp_path.parent / f"{name}-out"
    manifest = loftq_cli.quantize(tmp_path, output=out, allow_nonfinite=True, **RECIPE)
    dense = [record for record in manifest.kept if record.kind == "expert"]
    assert len(dense) == kept and all("holds nan" in record.reason for record in dense)
    load_plainly(out, "AutoModelForCausalLM")


def test_tables_show_the_experts_of_a_layer_on_one_line(tmp_path: Path) -> None:
    source, out = saved("qwen3_moe").folder, tmp_path / "out"
    plan = loftq("plan", source, "--bits", 2, "--rank", 4)
    [line] = [line for line in plan.stdout.splitlines() if "mlp.experts.gate_up_proj" in line]
    assert line.split()[:2] == ["model.layers.*.mlp.experts.gate_up_proj", "16"]
    assert "matrices of experts are packed on disk" in plan.stderr
    loftq("quantize", source, "-o", out, "--bits", 2, "--rank", 4, "--iters", 1)
    short, full = loftq("inspect", out).stdout, loftq("inspect", out, "--verbose").stdout
    assert short.count("experts.gate_up_proj") == 2 and "8 × 64 × 64" in short
    assert full.count("experts.gate_up_proj[") == 16
    card = (out / "README.md").read_text()
    assert "The experts are packed on disk and dequantized when the model is loaded" in card
    refusal = loftq("plan", source, "--bits", 4, "--format", "bnb", "--experts", "require", code=2)
    assert "as --experts require asks" in sentence(refusal)
    assert "choose one of quantize, require, keep" in sentence(loftq("plan", source, "--experts", "stop", code=2))


def test_a_missing_expert_is_named_before_work_starts(tmp_path: Path) -> None:
    source = saved("mixtral").folder
    stored = load_file(source / "model.safetensors")
    del stored["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(
        LoftqError, match=r"layers.1.\S*gate_up_proj consists of 8 matrices, but the checkpoint has 7 of them"
    ):
        loftq_cli.plan(tmp_path, output=tmp_path / "out")


def test_a_bfloat16_mixture_keeps_its_dtype(tmp_path: Path) -> None:
    model = FAMILIES["qwen3_moe"]().bfloat16()
    model.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(tmp_path / "source", output=out, **RECIPE)
    loaded = load_plainly(out, "AutoModelForCausalLM").get_base_model()
    layer = loaded.model.layers[0].mlp.experts.get_base_layer()
    assert layer.gate_up_proj.dtype == torch.bfloat16
    for record in manifest.matrices:
        if record.expert and ".layers.0." in record.parameter and "gate_up" in record.parameter:
            first = record.expert.part * record.shape[0]
            stored = layer.gate_up_proj[record.expert.index][first : first + record.shape[0]]
            assert torch.equal(stored.float(), decode_matrix(out, manifest, record))
