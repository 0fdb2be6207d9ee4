"""The model card: its snippet runs unchanged, its command repeats the run, and its numbers are the manifest's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.testing
import yaml
from support.families import FAMILIES

import loftq_cli
from loftq_cli.cli import app


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"bits": 2}),
        ("llama", {"bits": 4}),
        ("llama", {"bits": 3, "format": "dense"}),
        ("llama", {"bits": 4, "format": "compressed-tensors", "group_size": 32}),
        ("llama", {"bits": 4, "format": "gguf"}),
        ("llama", {"bits": 3, "format": "packed", "data_type": "int", "group_size": 32}),
        ("llama", {"bits": 4, "format": "gptq", "group_size": 32}),
        ("t5", {"bits": 2}),
        ("bert_classifier", {"bits": 2, "method": "qlora"}),
        ("llama", {"bits": 2, "include": ("*embed_tokens",), "embeddings": "quantize"}),
    ],
    ids=[
        "packed",
        "bnb",
        "dense",
        "compressed-tensors",
        "gguf",
        "integers",
        "gptq",
        "seq2seq",
        "classifier",
        "no adapter",
    ],
)
def test_snippet_runs_unchanged(family: str, recipe: dict, tmp_path: Path) -> None:
    needs = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel"}.get(recipe.get("format", ""))
    if needs:
        pytest.importorskip(needs)
    if recipe == {"bits": 4}:
        pytest.importorskip("bitsandbytes")
    FAMILIES[family]().save_pretrained(tmp_path / "source")
    out = tmp_path / "a directory with späces"
    manifest = loftq_cli.quantize(tmp_path / "source", output=out, rank=4, iters=2, **recipe)
    card = (out / "README.md").read_text()
    (code,) = blocks(card, "python")
    scope: dict[str, object] = {}
    exec(code, scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted = sum(record.rank > 0 for record in manifest.matrices)
    assert len([name for name in trainable if "lora_" in name]) == 2 * adapted


def test_command_on_the_card_repeats_the_run(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = {"bits": 2, "rank": 4, "rule": ("q_proj=4", "k=skip"), "alpha": 8.0, "keep_last": True, "iters": 2}
    loftq_cli.quantize(random_llama, output=out, **recipe)
    card = (out / "README.md").read_text()
    command = shlex.split(blocks(card, "bash")[-1])
    assert command[:2] == ["loftq", "quantize"]
    command[command.index("-o") + 1] = str(tmp_path / "again")
    result = typer.testing.CliRunner().invoke(app, [*command[1:], "-q"])
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors", "loftq.yaml"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_numbers_and_front_matter(minilm: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(minilm, output=tmp_path / "out", bits=2, rank=4, iters=1)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert {"loftq", "lora", "quantized"} <= set(front["tags"]) and front["license"] == "apache-2.0"
    for number in (manifest.totals.plain_residual, manifest.totals.residual):
        assert f"{number:.4f}" in card
    worst = max(manifest.matrices, key=lambda record: record.residual)
    assert worst.module in card and "2.50 effective" in card and "91" in card


def test_base_model_is_named_where_the_source_is_from_the_hubs_cache(random_llama: Path, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "models--some-org--Some-Llama" / "snapshots" / "0123abcd"
    shutil.copytree(random_llama, source)
    loftq_cli.quantize(source, output=tmp_path / "out", bits=2, rank=4, iters=1)
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "some-org/Some-Llama" and front["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: " + "[" * 20_000 + "\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\n? [a]\n: 1\n---\n",
        "---\nlicense: mit\\ud800\n---\n",
        "---",
    ],
    ids=["deep", "tag", "list as a key", "half a character", "open"],
)
def test_an_odd_card_of_the_source_is_ignored(card: str, random_llama: Path, tmp_path: Path) -> None:
    from loftq_cli.artifacts.card import _licence

    (tmp_path / "README.md").write_text(card)
    assert all(line.startswith("license: ") for line in _licence(tmp_path))


def test_the_licence_of_the_source_cannot_reorder_the_card(tmp_path: Path) -> None:
    from loftq_cli.artifacts.card import _licence

    (tmp_path / "README.md").write_text('---\nlicense: mit\u202ezzz\nlicense_name: "a\\nb: c"\n---\n')
    lines = "\n".join(_licence(tmp_path))
    assert "\u202e" not in lines and set(yaml.safe_load(lines)) == {"license", "license_name"}


def test_names_cannot_break_out_of_the_card(random_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "a`b|c\n# <script> [x](y)\u202e```"
    loftq_cli.quantize(random_llama, output=output, bits=2, rank=4, iters=1)
    card = (output / "README.md").read_text()
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert heading == "# a?b?c\\n# ?script? ?x?(y)\\u202e???"
    assert "\u202e" not in card and not any(line.startswith("# <") for line in card.splitlines())
    assert sum(line.strip() == "```" for line in card.splitlines()) == 3 == card.count("\n```") - 3
