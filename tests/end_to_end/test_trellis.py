"""`--levels trellis` from the source to a loaded, checked and merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.handmade import tiny_llama, tokens
from support.interruptions import stop_after, tensors
from support.loading import load_plainly
from typer.testing import CliRunner

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.runtime.quantizer import LoftqConfig

RECIPE = {"format": "packed", "rank": 4}
METHODS = {
    "refined": {"method": "refined", "levels": "trellis", "bits": 2, "iters": 3, "rule": ("down_proj=3", "o_proj=8")},
    "loftq": {"method": "loftq", "levels": "trellis-fast", "bits": 4, "iters": 2},
    "qlora": {"method": "qlora", "levels": "trellis-fast", "bits": 3, "embeddings": "quantize"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    tiny_llama().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", METHODS)
def test_the_loaded_model_has_the_weights_that_were_optimised(name: str, source: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", {**RECIPE, **METHODS[name]}
    plan = loftq_cli.plan(source, output=out, **recipe)
    manifest = loftq_cli.quantize(source, output=out, **recipe)
    assert {record.data_type for record in manifest.matrices} <= {recipe["levels"], "uniform"}
    assert manifest.totals.bits_stored == manifest.totals.bits_effective
    assert plan.backbone_bytes == manifest.totals.backbone_bytes
    sizes = {file: (out / file).stat().st_size for file in manifest.files}
    assert sizes == {file: record.nbytes for file, record in manifest.files.items()}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["version"] == 3
    model = load_plainly(out, "AutoModelForCausalLM")
    for record in manifest.matrices:
        layer = model.base_model.model.get_submodule(record.module)
        layer = getattr(layer, "base_layer", layer)
        assert torch.equal(layer.dequantized_weight(torch.float32), decode_matrix(out, manifest, record))
    model(tokens()).logits.float().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_checking_and_merging(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(source, output=out, **RECIPE, **METHODS["loftq"])

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "residuals recomputed" in call("verify", out, "--source", source)
    call("merge", out, out / "loftq_init", "-o", tmp_path / "dense")
    call("merge", out, out / "loftq_init", "-o", tmp_path / "packed", "--to", "requantize")
    from transformers import AutoModelForCausalLM

    for name in ("dense", "packed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens())


def test_interruptions_and_threads_change_no_byte(source: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, **METHODS["refined"]}
    stop_after(4, source, tmp_path / "part", **recipe)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    loftq_cli.quantize(source, output=tmp_path / "part", **{"max_shard_size": "40KB", **recipe})
    torch.set_num_threads(before)
    loftq_cli.quantize(source, output=tmp_path / "shards", **{"max_shard_size": "40KB", **recipe})
    assert tensors(tmp_path / "part") == tensors(tmp_path / "shards")


def test_what_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match=r"only packed and dense files can hold --levels trellis"):
        loftq_cli.plan(source, bits=2, method="qlora", levels="trellis", format="bnb")
    with pytest.raises(UsageError, match=r"no zero points, as --method qa-lora needs"):
        loftq_cli.plan(source, method="qa-lora", levels="trellis")
    with pytest.raises(UsageError, match=r"--levels fitted needs --method"):
        loftq_cli.plan(source, method="loftq", levels="fitted")
    group = {"bits": 2, "data_type": "trellis", "state_bits": 10, "block_size": 64, "scale_dtype": "bfloat16"}
    LoftqConfig([{**group, "table": 1, "modules": []}])
    for changes in ({"table": 2}, {"table": 1, "state_bits": 11}):
        with pytest.raises(LoftqError, match=r"this loftq lacks: run `pip install -U 'loftq-cli @ git[^ ]*'`\."):
            LoftqConfig([{**group, **changes, "modules": []}])
