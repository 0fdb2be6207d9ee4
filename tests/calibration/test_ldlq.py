"""`--method ldlq`: a calibrated conversion into every container, resumed, shared among workers, and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.calibration_text import TEXT
from support.interruptions import StopAfter, tensors
from support.loading import dense_weight, load_plainly
from support.perplexity import write_tokenizer

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix
from loftq_cli.calibration.moments import open_moments
from loftq_cli.errors import UsageError
from loftq_cli.recipe.model import Recipe

OPTIONS = {"method": "ldlq", "rank": 4, "iters": 2, "calibration_tokens": 200}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices every container can hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=100,
        dtype=torch.float32,
    )
    path = tmp_path_factory.mktemp("ldlq") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)
    return path


CONTAINERS = [
    ("packed", {"bits": 2, "levels": "fitted"}, ""),
    ("packed", {"bits": 3, "data_type": "int"}, ""),
    ("bnb", {"bits": 2, "levels": "nf4-subset"}, "bitsandbytes"),
    ("bnb", {"bits": 4, "double_quant": True}, "bitsandbytes"),
    ("dense", {"bits": 2}, ""),
    ("compressed-tensors", {"bits": 4}, "compressed_tensors"),
    ("gptq", {"bits": 4}, "gptqmodel"),
    ("gptq-v2", {"bits": 2, "symmetric": False}, "gptqmodel"),
]


@pytest.mark.parametrize(("name", "recipe", "needed"), CONTAINERS)
def test_what_is_optimised_is_what_loads(
    name: str, recipe: dict, needed: str, model: Path, text: Path, tmp_path: Path, own_cache: Path
) -> None:
    """The real loader's backbone is Q bit for bit; `verify` recomputes both residuals, even without the cache."""
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(model, output=out, format=name, calibrate=text, **OPTIONS, **recipe)
    assert manifest.recipe["calibrate_kind"] == "full" and manifest.recipe["init"] == "svd"
    for record in manifest.matrices:
        assert record.weighted_residual is not None and record.weighted_plain_residual is not None
        assert record.weighted_residual < record.weighted_plain_residual and len(record.residuals) == 2
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    kept.unlink()
    found = loftq_cli.verify(out, source=model)
    assert found.ok and found.weighted == len(manifest.matrices)
    if needed:
        pytest.importorskip(needed)
    loaded = loftq_cli.load(out, trainable=True) if "gptq" in name else load_plainly(out, "AutoModelForCausalLM")
    for record in manifest.matrices:
        layer = loaded.base_model.model.get_submodule(record.module).base_layer
        weight = layer.dequantize_weight().T.float() if "gptq" in name else dense_weight(layer)
        assert torch.equal(weight, decode_matrix(out, manifest, record)), record.module


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_gguf_holds_what_was_optimised(bits: int, symmetric: bool, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = {"bits": bits, "symmetric": symmetric, "format": "gguf"}
    manifest = loftq_cli.quantize(model, output=out, calibrate=text, **OPTIONS, **recipe)
    base = loftq_cli.load(out, trainable=True).base_model.model
    for record in manifest.matrices:
        loaded = base.get_submodule(record.module).base_layer.weight
        assert torch.equal(loaded, decode_matrix(out, manifest, record).to(loaded.dtype))
        assert record.weighted_residual is not None and record.weighted_residual < record.weighted_plain_residual
    assert loftq_cli.verify(out, source=model).ok


def test_a_stopped_run_and_two_workers_give_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "bits": 2, "levels": "fitted", "format": "packed", "calibrate": text}
    options["max_shard_size"] = "40KB"
    loftq_cli.quantize(model, output=tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        loftq_cli.quantize(model, output=tmp_path / "resumed", reporter=StopAfter(4), **options)
    loftq_cli.quantize(model, output=tmp_path / "resumed", **options)
    loftq_cli.quantize(model, output=tmp_path / "shared", num_processes=2, **options)
    whole = tensors(tmp_path / "whole")
    assert whole and tensors(tmp_path / "resumed") == whole == tensors(tmp_path / "shared")


def test_a_wrong_weighted_residual_is_found(model: Path, text: Path, tmp_path: Path, own_cache: Path) -> None:
    """As if the moments that weighted the fit had been others."""
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    loftq_cli.quantize(model, output=out, bits=2, calibrate=text, **OPTIONS)
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    about, changed = dict(open_moments(kept).about), load_file(kept)
    save_file({name: moment + torch.eye(len(moment)) for name, moment in changed.items()}, kept, about)
    found = loftq_cli.verify(out, source=model)
    assert not found.ok and all("weighted residual" in problem.what for problem in found.problems)
    text.unlink()
    kept.unlink()
    without = loftq_cli.verify(out, source=model)
    assert without.ok and without.weighted == 0


def test_embeddings_have_no_moments_and_are_fitted_without(model: Path, text: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(
        model, output=tmp_path / "out", bits=2, embeddings="adapt", calibrate=text, format="packed", **OPTIONS
    )
    record = manifest.matrix("model.embed_tokens")
    assert record.weighted_residual is None and record.residual < record.plain_residual


def test_the_plan_knows_sizes_and_memory(model: Path, text: Path, tmp_path: Path) -> None:
    plan = loftq_cli.plan(model, output=tmp_path / "out", bits=2, calibrate=text, **OPTIONS)
    manifest = loftq_cli.quantize(model, output=tmp_path / "out", bits=2, calibrate=text, **OPTIONS)
    assert plan.backbone_bytes == manifest.totals.backbone_bytes
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--method ldlq" in card and f"--calibrate {text}" in card and "--calibrate-kind" not in card
    assert "calibrate_kind: full" in (tmp_path / "out" / "loftq.yaml").read_text()


def test_the_recipe() -> None:
    recipe = Recipe("m", method="ldlq", calibrate="text.txt")
    assert (recipe.calibrate_kind, recipe.iters, recipe.init) == ("full", 4, "svd")
    assert Recipe("m").calibrate_kind == Recipe("m", calibrate="text.txt").calibrate_kind == "diagonal"
    assert Recipe("m", method="ldlq", calibrate="text.txt", calibrate_kind="diagonal").calibrate_kind == "diagonal"
    with pytest.raises(UsageError, match="--method ldlq needs --calibrate"):
        Recipe("m", method="ldlq")
    with pytest.raises(UsageError, match="qlora and --iters 0 skip"):
        Recipe("m", method="ldlq", calibrate="text.txt", iters=0)
    assert json.loads(json.dumps(recipe.as_dict()))["method"] == "ldlq"
