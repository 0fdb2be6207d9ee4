"""`loftq merge` of mixtures stores every expert's Q + BA under its own name, equal to PEFT's merge in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import loftq, sentence
from support.families import FAMILIES
from support.family_checkpoints import save, saved
from support.loading import load_plainly

import loftq_cli
from loftq_cli.merging.job import Piece

RECIPE = {"bits": 2, "rank": 4, "iters": 1, "alpha": 6.0}
# One matrix an expert; the same with shared experts and dense layers of the same names; one 3-D tensor; transposed.
LAYOUTS = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss")
IDS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))


def train(out: Path, folder: Path) -> torch.nn.Module:
    """Train two steps with PEFT, save with PEFT, and return the model. Factors of gate and up are mixed by then."""
    model = load_plainly(out, "AutoModelForCausalLM").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


def merged_in_memory(model: torch.nn.Module) -> torch.nn.Module:
    """By PEFT."""
    if getattr(model.get_base_model(), "quantization_method", None):
        model.get_base_model().dequantize()
    return model.merge_and_unload().eval()


def load_merged(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def check_alike(found: torch.nn.Module, expected: torch.nn.Module, atol: float = 1e-6) -> None:
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.allclose(ours[name].float(), value.float(), atol=atol, rtol=0), name
    with torch.no_grad():
        assert torch.allclose(found(IDS).logits, expected(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_dense_is_what_peft_merges(name: str, form: str, tmp_path: Path) -> None:
    source, out = saved(name), tmp_path / "out"
    manifest = loftq_cli.quantize(source.folder, output=out, format=form, **RECIPE)
    expected = merged_in_memory(train(out, tmp_path / "trained"))
    report = loftq_cli.merge(out, tmp_path / "trained", output=tmp_path / "merged", max_shard_size="30KB")
    assert report.way == "dense" and report.worst_error == 0.0 and len(report.errors) == len(manifest.matrices)
    check_alike(load_merged(tmp_path / "merged"), expected)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    stored = {key: tuple(value.shape) for file in files for key, value in load_file(file).items()}
    assert stored == source.shapes and len(files) > 1, "the names and the layout of the source"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_that_was_kept_merges_too(name: str, tmp_path: Path) -> None:
    """Adapters over experts in full precision, beside a parameter without any, and other ranks."""
    out, rules = tmp_path / "out", (r"layers\.0.*gate_up=skip", r"layers\.1.*gate_up=dense", r"layers\.0.*down=4:2")
    loftq_cli.quantize(saved(name).folder, output=out, rule=rules, **RECIPE)
    expected = merged_in_memory(train(out, tmp_path / "trained"))
    report = loftq_cli.merge(out, tmp_path / "trained", output=tmp_path / "merged")
    assert any("layers.1.mlp.experts.gate_up_proj[0]" in module for module in report.errors)
    assert not any("layers.0.mlp.experts.gate_up_proj" in module for module in report.errors)
    check_alike(load_merged(tmp_path / "merged"), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_compressed_tensors(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out = tmp_path / "out"
    recipe = {**RECIPE, "bits": bits, "format": "compressed-tensors", "group_size": 32}
    loftq_cli.quantize(saved("mixtral").folder, output=out, **recipe)
    expected = merged_in_memory(train(out, tmp_path / "trained"))
    loftq_cli.merge(out, tmp_path / "trained", output=tmp_path / "merged")
    check_alike(load_merged(tmp_path / "merged"), expected)


@pytest.mark.parametrize(
    ("name", "form"), [("mixtral", "packed"), ("gpt_oss", "packed"), ("mixtral", "compressed-tensors")]
)
def test_requantize_says_what_it_costs(name: str, form: str, tmp_path: Path) -> None:
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out, recipe = tmp_path / "out", {**RECIPE, "group_size": 32} if form != "packed" else RECIPE
    loftq_cli.quantize(saved(name).folder, output=out, format=form, **recipe)
    train(out, tmp_path / "trained")
    report = loftq_cli.merge(out, tmp_path / "trained", output=tmp_path / "merged", to="requantize")
    loftq_cli.merge(out, tmp_path / "trained", output=tmp_path / "dense")
    exact = load_merged(tmp_path / "dense")
    manifest = loftq_cli.read_manifest(tmp_path / "merged")
    for record in manifest.matrices:
        if record.expert is not None:
            stack = exact.get_parameter(record.parameter)[record.expert.index]
            weight = record.orientation.turn(stack)
            weight = weight[record.expert.part * record.shape[0] :][: record.shape[0]]
            left = float((weight - loftq_cli.decode(tmp_path / "merged", record.module)).norm() / weight.norm())
            assert left == pytest.approx(report.errors[record.module], rel=1e-4) and 0.01 < left < 1
    assert loftq_cli.verify(tmp_path / "merged").ok
    with torch.no_grad():
        assert load_merged(tmp_path / "merged")(IDS).logits.isfinite().all()


def test_a_bfloat16_mixture_is_rounded_once(tmp_path: Path) -> None:
    source, out = save(FAMILIES["qwen3_moe"]().bfloat16(), tmp_path / "source").folder, tmp_path / "out"
    loftq_cli.quantize(source, output=out, **RECIPE)
    exact = loftq_cli.merge(out, out / "loftq_init", output=tmp_path / "exact", dtype="float32")
    rounded = loftq_cli.merge(out, out / "loftq_init", output=tmp_path / "rounded")
    assert exact.worst_error == 0.0 and rounded.dtype == "bfloat16" and 0 < rounded.worst_error < 2**-8
    stored = {run: load_file(tmp_path / run / "model.safetensors") for run in ("exact", "rounded")}
    for key, value in stored["exact"].items():
        assert value.dtype == torch.float32 and torch.equal(value.bfloat16(), stored["rounded"][key]), key


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_one_expert_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the checkpoint stores them, no step holds more than one matrix."""
    from loftq_cli.merging import merge as engine

    out, sizes, whole = tmp_path / "out", [], engine.merge_piece

    def watch(job: object, piece: Piece):
        tensors, error = whole(job, piece)
        if "expert" in (piece.module or ""):
            sizes.append(sum(tensor.numel() for tensor in tensors.values()))
        return tensors, error

    manifest = loftq_cli.quantize(saved(name).folder, output=out, **RECIPE)
    monkeypatch.setattr(engine, "merge_piece", watch)
    loftq_cli.merge(out, out / "loftq_init", output=tmp_path / "merged")
    experts = [record for record in manifest.matrices if record.expert]
    assert sorted(sizes) == sorted(record.shape[0] * record.shape[1] for record in experts)


def test_adapters_of_other_mixtures_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(saved("mixtral").folder, output=out, **RECIPE)
    adapter = load_file(out / "loftq_init" / "adapter_model.safetensors")
    config = json.loads((out / "loftq_init" / "adapter_config.json").read_text())

    def refused(said: str, tensors: dict[str, torch.Tensor], **changes: object) -> None:
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        assert said in sentence(loftq("merge", out, folder, "-o", tmp_path / "never", code=1))

    only_down = [name for name in config["target_parameters"] if "down" in name]
    refused("has adapters for 1 of them", adapter, target_parameters=only_down)
    fewer = {n: t[:-4].clone() if "experts.lora_A" in n else t for n, t in adapter.items()}
    refused("have ranks 12 and 16", fewer)
    odd = {n: t[:-1].clone() if "experts.lora_A" in n else t for n, t in adapter.items()}
    odd = {n: t[:, :-1].clone() if "experts.lora_B" in n else t for n, t in odd.items()}
    refused("give the adapter of this model", odd)
    narrow = {n: t[:, 1:].clone() if "experts.base_layer.lora_A" in n else t for n, t in adapter.items()}
    refused("give the adapter of this model", narrow)
    refused("not a matrix of", {n.replace("layers.1.mlp", "layers.7.mlp"): t for n, t in adapter.items()})
