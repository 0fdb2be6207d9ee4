"""The plan: exact sizes, what is chosen and why, what is refused before work starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.artifacts.summary import text_sizes
from loftq_cli.cli.plan import output_sizes
from loftq_cli.errors import LoftqError, UsageError


def edit_config(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other config.json fields."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    "recipe",
    [
        {"bits": 4},
        {"bits": 2, "rank": 8, "max_shard_size": "20KB"},
        {"bits": 3, "format": "packed", "embeddings": "adapt", "lm_head": "quantize", "iters": 2},
        {"bits": 2, "format": "dense", "method": "qlora", "dtype": "bfloat16"},
        {"bits": 8, "rule": ("q_proj=2:4", "v_proj=skip", "k_proj=dense"), "alpha": 32.0},
    ],
    ids=["bnb", "sharded", "embedding and head", "dense bf16", "rules"],
)
def test_every_output_file_has_the_planned_size(recipe: dict, random_llama: Path, tmp_path: Path) -> None:
    plan = loftq_cli.plan(random_llama, output=tmp_path / "out", **recipe)
    loftq_cli.quantize(random_llama, output=tmp_path / "out", **recipe)
    files = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: path.stat().st_size for name, path in files.items()} == output_sizes(plan, text_sizes(plan))


def test_plan_reads_no_weights(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.checkpoint.safetensors import SafetensorsCheckpoint

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SafetensorsCheckpoint, "read", refuse)
    assert loftq_cli.plan(random_llama, bits=2).matrices


def chosen(random_llama: Path, **recipe: object) -> dict[str, tuple[int, int]]:
    """module → (bits, rank)."""
    plan = loftq_cli.plan(random_llama, **recipe)
    return {
        unit.module: (unit.matrix.grid.codebook.bits, unit.target.rank if unit.target else 0) for unit in plan.matrices
    }


def test_filters_and_rules(random_llama: Path) -> None:
    everything = chosen(random_llama)
    assert len(everything) == 14 and set(everything.values()) == {(4, 16)}
    assert set(chosen(random_llama, include=("*.layers.0.*",))) == {m for m in everything if ".layers.0." in m}
    assert not any("q_proj" in m for m in chosen(random_llama, exclude=("*.q_proj",)))
    rules = ("q_proj=2:4", r"layers\.1\..*k_proj=8", "v_proj=skip", "o_proj=dense", "proj=3")
    ruled = chosen(random_llama, rule=rules)
    assert ruled["model.layers.0.self_attn.q_proj"] == (2, 4), "the first match wins"
    assert ruled["model.layers.1.self_attn.k_proj"] == (8, 16)
    assert ruled["model.layers.0.self_attn.k_proj"] == (3, 16)
    assert not any("v_proj" in m or "o_proj" in m for m in ruled)
    plan = loftq_cli.plan(random_llama, rule=rules)
    adapted = {unit.module for unit in plan.kept if unit.target}
    assert adapted == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    assert all(unit.reason for unit in plan.kept)


def test_rank_never_exceeds_the_matrix(random_llama: Path) -> None:
    ranks = chosen(random_llama, rank=64)
    assert ranks["model.layers.0.self_attn.k_proj"] == (4, 32) and ranks["model.layers.0.mlp.up_proj"] == (4, 64)


def test_filters_without_a_match_are_noted(random_llama: Path) -> None:
    plan = loftq_cli.plan(random_llama, exclude=("*.c_attn",), rule=("wq=2",))
    assert any("--exclude '*.c_attn' matches no module" in note for note in plan.notes)
    assert any("--rule 'wq=2' matches no module" in note for note in plan.notes)


def test_auto_format(random_llama: Path) -> None:
    def resolved(**recipe: object) -> str:
        return loftq_cli.plan(random_llama, **recipe).recipe.format

    assert resolved(bits=4) == "bnb" and resolved(bits=2) == "packed" and resolved(bits=8) == "packed"
    assert resolved(bits=4, data_type="uniform") == "packed" and resolved(bits=4, rule=("q_proj=2",)) == "packed"
    assert resolved(bits=4, embeddings="quantize") == "packed"


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"bits": 3, "format": "bnb"}, "3-bit nf levels are not among them"),
        ({"data_type": "uniform", "format": "bnb"}, "use --format packed"),
        ({"embeddings": "quantize", "format": "bnb"}, "cannot quantize embeddings"),
        ({"include": ("nothing",)}, "nothing in"),
    ],
)
def test_what_cannot_be_held_is_refused_before_work(recipe: dict, sentence: str, random_llama: Path) -> None:
    with pytest.raises(LoftqError, match=sentence):
        loftq_cli.plan(random_llama, **recipe)


def test_quantized_source_is_refused(random_llama: Path, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}, "_name_or_path": "meta-llama/Llama-2-7b-hf"}
    source = edit_config(random_llama, tmp_path / "gptq", **config)
    with pytest.raises(LoftqError, match=r"already quantized \(gptq\).*meta-llama/Llama-2-7b-hf"):
        loftq_cli.plan(source)


def test_integer_weights_are_refused_by_name(random_llama: Path, tmp_path: Path) -> None:
    source = edit_config(random_llama, tmp_path / "int")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, source / "model.safetensors")
    with pytest.raises(LoftqError, match=f"{name} in model.safetensors is stored as int8"):
        loftq_cli.plan(source)
    assert loftq_cli.plan(source, exclude=("*.layers.1.mlp.up_proj",)).matrices


@pytest.mark.parametrize("place", ["same", "inside", "above"])
def test_output_may_not_touch_the_source(place: str, random_llama: Path) -> None:
    output = {"same": random_llama, "inside": random_llama / "out", "above": random_llama.parent}[place]
    with pytest.raises(UsageError, match="overlap"):
        loftq_cli.quantize(random_llama, output=output)
    assert not (random_llama / "out").exists()


def test_device_that_is_not_there(random_llama: Path, tmp_path: Path) -> None:
    for device in ("cuda:99", "gpu", "cuda:x"):
        with pytest.raises(UsageError, match="--device"):
            loftq_cli.quantize(random_llama, output=tmp_path / "out", device=device)
