"""Recipes: invalid values are refused in one sentence, and YAML and flags are equivalent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loftq_cli.errors import ExitCode, UsageError
from loftq_cli.recipe.model import Recipe, make_recipe, parse_rule, parse_size, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"bits": 5}, "--bits"),
        ({"bits": "4"}, "--bits"),
        ({"bits": True}, "--bits"),
        ({"rank": 0}, "--rank"),
        ({"rank": 2.5}, "--rank"),
        ({"iters": -1}, "--iters"),
        ({"block_size": 48}, "--block-size"),
        ({"method": "gptq"}, "--method"),
        ({"data_type": "fp4"}, "--data-type"),
        ({"format": "awq"}, "--format"),
        ({"embeddings": "drop"}, "--embeddings"),
        ({"lm_head": "adapt"}, "--lm-head"),
        ({"dtype": "float8"}, "--dtype"),
        ({"alpha": 0}, "--alpha"),
        ({"alpha": float("nan")}, "--alpha"),
        ({"max_shard_size": "many"}, "many"),
        ({"max_shard_size": "10B"}, "--max-shard-size"),
        ({"keep_last": "yes"}, "--keep-last cannot be 'yes': give true or false."),
        ({"rule": ["q_proj"]}, "REGEX=SPEC"),
        ({"rule": ["(=4"]}, "regular expression"),
        ({"rule": ["q=5"]}, "SPEC"),
        ({"rule": ["q=4:0"]}, "SPEC"),
        ({"include": [3]}, "include"),
        ({"bit": 4}, "did you mean bits?"),
    ],
)
def test_invalid_values_are_refused(given: dict, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe({"model": "m", **given})
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


def test_rules_parse() -> None:
    rule = parse_rule(r"layers\.0\..*proj=4:32")
    assert (rule.bits, rule.rank, rule.keep) == (4, 32, "")
    assert rule.matches("model.layers.0.self_attn.q_proj") and not rule.matches("model.layers.1.self_attn.q_proj")
    assert parse_rule("lm_head=skip").keep == "skip" and parse_rule("a=dense").keep == "dense"
    assert parse_rule("name=with=equals=8").pattern == "name=with=equals"


def test_sizes_parse() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 MiB") == 3 * 2**19 and parse_size(4096) == 4096


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe("m", bits=2, rank=64, rule=("q_proj=4", "k=skip"), alpha=32.0, keep_last=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(write_yaml(recipe))
    assert make_recipe({}, path) == recipe
    assert make_recipe({"bits": 4, "rank": None}, path) == dataclasses.replace(recipe, bits=4)


def test_yaml_may_use_the_flags_spelling(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nblock-size: 32\nlm-head: quantize\n")
    recipe = make_recipe({}, path)
    assert recipe.block_size == 32 and recipe.lm_head == "quantize"


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "bits: [", "!!python/object/apply:os.system ['touch executed']", "1: 2", "\x00"]
)
def test_invalid_yaml_is_refused_and_runs_no_code(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        read_yaml(path)
    assert not (tmp_path / "executed").exists()


def test_missing_yaml_and_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no model"):
        make_recipe({"bits": 4})


def test_fingerprint_depends_on_all_but_the_path() -> None:
    recipe = Recipe("m")
    assert recipe.fingerprint("s") == dataclasses.replace(recipe, model="elsewhere").fingerprint("s")
    others = [dataclasses.replace(recipe, **change) for change in ({"bits": 2}, {"seed": 1}, {"rule": ("a=4",)})]
    assert len({recipe.fingerprint("s"), recipe.fingerprint("t"), *(other.fingerprint("s") for other in others)}) == 5
