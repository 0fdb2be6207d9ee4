"""`loftq eval` of QA-LoRA outputs, pooled adapters over integers with float zeros, against transformers and PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.perplexity import WINDOW, plain_perplexity, runner

import loftq_cli
from loftq_cli.cli import app

TOKENS = 600
# By checkpoint: on the shipped one, whose pooled adapters have few inputs, the start changes almost nothing.
START_TO_PLAIN = {"tiny-llama": lambda ratio: ratio < 1, "llama": lambda ratio: ratio == pytest.approx(1.0, abs=2e-3)}
# bfloat16, whose integers stay unrounded; zeros are float32.
RECIPE = {"method": "qa-lora", "bits": 2, "group_size": 32, "rank": 8}


@pytest.fixture(scope="module")
def text_file(wikitext: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(wikitext[:10_000], encoding="utf-8")
    return path


@pytest.mark.parametrize("scale", ["minmax", "mse"])
def test_agrees_with_transformers_and_peft(scale: str, small_llama: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, plain = tmp_path / "out", tmp_path / "plain"
    manifest = loftq_cli.quantize(small_llama, output=out, iters=2, scale=scale, **RECIPE)
    loftq_cli.quantize(small_llama, output=plain, init="zero", scale=scale, **RECIPE)  # the weight itself, quantized
    words = ["eval", str(out), "--text", str(text_file), "--max-tokens", str(TOKENS), "--window", str(WINDOW), "--json"]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0, shown.stderr
    found = {score["model"]: score["perplexity"] for score in json.loads(shown.stdout)["scores"]}
    ids = AutoTokenizer.from_pretrained(small_llama)(text_file.read_text(encoding="utf-8"))["input_ids"][:TOKENS]
    wide = {"dtype": torch.float32}
    expected = {
        "source": plain_perplexity(AutoModelForCausalLM.from_pretrained(small_llama, **wide), ids),
        "plain": plain_perplexity(loftq_cli.load(plain, adapter=False, **wide), ids),
        "backbone": plain_perplexity(AutoModelForCausalLM.from_pretrained(out, **wide), ids),
        "start": plain_perplexity(loftq_cli.load(out, **wide), ids),
    }
    assert found == {name: pytest.approx(perplexity, rel=2e-4) for name, perplexity in expected.items()}
    # With zeros fitted by squared error the groups' means are right already, and a pooled start has little to add.
    assert expected["source"] < min(expected["start"], expected["plain"]) and len(set(expected.values())) == 4
    if scale == "minmax":
        assert manifest.totals.residual < manifest.totals.plain_residual
        assert START_TO_PLAIN[small_llama.name](expected["start"] / expected["plain"]), expected


def test_the_table_names_all_four(small_llama: Path, text_file: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(small_llama, output=tmp_path / "out", iters=1, **{**RECIPE, "bits": 4})
    words = ["eval", str(tmp_path / "out"), "--text", str(text_file), "--max-tokens", "200", "--window", "64"]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0 and shown.stderr == "", shown.stderr
    for expected in ("perplexity", "source", "plain", "backbone", "start"):
        assert expected in shown.stdout
    assert math.isfinite(json.loads(runner.invoke(app, [*words, "--json"]).stdout)["scores"][-1]["loss"])
