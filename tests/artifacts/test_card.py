"""The model card: its snippet runs unchanged, its command repeats the run, and its numbers are the manifest's."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer.testing
import yaml
from support.families import FAMILIES

import loftq_cli
from loftq_cli._version import REQUIREMENT
from loftq_cli.artifacts import summary
from loftq_cli.artifacts.card import _number, render_card
from loftq_cli.cli import app
from loftq_cli.machine.sizes import size_text


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
    assert worst.module in card and "2.50 effective" in card
    assert size_text(manifest.totals.source_bytes) in card and 90e6 < manifest.totals.source_bytes < 92e6


def test_base_model_is_named_where_the_source_is_from_the_hubs_cache(random_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "models--some-org--Some-Llama" / "snapshots" / "0123abcd"
    shutil.copytree(random_llama, source)
    loftq_cli.quantize(source, output=tmp_path / "out", bits=2, rank=4, iters=1)
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "some-org/Some-Llama" and front["base_model_relation"] == "quantized"
    assert "\n# Some-Llama, 2-bit LoftQ\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "revision", "folder", "base"),
    [
        ("org/Model", "0123abcd", "models--org--Model/snapshots/0123abcd", "org/Model"),
        ("gpt2", "0123abcd", "models--gpt2/snapshots/0123abcd", "gpt2"),
        ("local/model", None, "local/model", None),
        ("model", None, "model", None),
        ("a b/c", "0123abcd", "x", None),
    ],
)
def test_base_model_is_an_id_on_the_hub_or_left_out(
    model: str, revision: str | None, folder: str, base: str | None, random_llama: Path, tmp_path: Path
) -> None:
    plan = loftq_cli.plan(random_llama, output=tmp_path / "out", bits=2, rank=4)
    recipe = dataclasses.replace(plan.recipe, model=model, revision=revision)
    plan = dataclasses.replace(plan, recipe=recipe, source=tmp_path / folder)
    front = yaml.safe_load(text_card(plan).split("---")[1])
    assert front.get("base_model") == base and ("base_model_relation" in front) == (base is not None)


def text_card(plan: loftq_cli.Plan) -> str:
    """The card with the widest numbers, as `plan` sizes it."""
    manifest = summary._manifest(
        plan,
        "0" * 64,
        tuple(summary._widest_record(unit, plan) for unit in plan.matrices),
        {},
        summary._planned_totals(plan),
        "cpu",
    )
    return render_card(manifest, plan).decode()


def test_sizes_are_readable_and_nothing_is_padded(random_llama: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=2, rank=4, iters=1)
    card = (tmp_path / "out" / "README.md").read_text()
    totals = manifest.totals
    sizes = f"{size_text(totals.source_bytes)} → {size_text(totals.backbone_bytes)}"
    assert f"| weights on disk | {sizes} |" in card and "kB" in sizes and "0.0" not in sizes
    assert f"| peak memory | {size_text(totals.peak_memory_bytes)} |" in card
    shown = card.rstrip(" \n")
    assert "  " not in re.sub(r"```.*?```", "", shown, flags=re.DOTALL), "blanks that a reader of the source sees"
    assert card.startswith("---\n") and "\n# llama, 2-bit LoftQ\n" in card


@pytest.mark.parametrize("value", [0.0, 0.45912, 9.99999, 99.99999, 12345.678, 99999.9, 123456.7, 1e99, 1e-99])
def test_a_residual_takes_no_more_room_than_planned(value: float) -> None:
    planned = max(len(_number(summary._WIDE_NUMBER)), len(_number(0.0)))
    assert len(_number(value)) <= planned == 6
    assert float(_number(value)) == pytest.approx(value, rel=0.5, abs=5e-5)


@pytest.mark.parametrize("size", [0, 999, 999_949, 999_999, 1e9 - 1, 99_999_999, 999.9e9, 123e12, 10**15 - 1])
def test_a_size_takes_no_more_room_than_planned(size: float) -> None:
    assert len(size_text(size)) <= len(size_text(summary._WIDE_BYTES))


@pytest.mark.parametrize("extra", [[], ["bits"]])
def test_the_install_line_is_the_one_that_works(extra: list[str], random_llama: Path, tmp_path: Path) -> None:
    formats = {"format": "dense"} if extra else {}
    loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=2, rank=4, iters=1, **formats)
    card = (tmp_path / "out" / "README.md").read_text()
    words = shlex.split(blocks(card, "bash")[0])
    assert words == ["pip", "install", "transformers", *(["peft"] if extra else [REQUIREMENT])]


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
    odd = "a`b|c\n# <script> [x](y)\u202e```"
    source, output = shutil.copytree(random_llama, tmp_path / "from" / odd), tmp_path / odd
    loftq_cli.quantize(source, output=output, bits=2, rank=4, iters=1)
    card = (output / "README.md").read_text()
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert heading == "# a?b?c\\n# ?script? ?x?(y)\\u202e???, 2-bit LoftQ"
    assert "\u202e" not in card and not any(line.startswith("# <") for line in card.splitlines())
    assert sum(line.strip() == "```" for line in card.splitlines()) == 3 == card.count("\n```") - 3
