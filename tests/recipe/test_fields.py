"""A recipe field's flag, keyword, schema and documentation are generated from its declaration."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from support.commands import runner
from support.paths import ROOT

import loftq_cli
from loftq_cli.cli import app
from loftq_cli.errors import UsageError
from loftq_cli.recipe.keywords import RecipeKeywords
from loftq_cli.recipe.model import Recipe, recipe_fields, recipe_specs
from loftq_cli.recipe.table import markdown_table

# Fields and fingerprints of recipes of version 0.1, which are in the metadata of its weight files.
FIELDS_OF_0_1 = {
    "model", "revision", "bits", "mix", "target_size", "weigh", "rank", "rank_budget", "iters", "method",
    "init", "levels", "data_type", "block_size", "group_size", "scale", "symmetric", "double_quant", "format",
    "dequantize", "rule", "include", "exclude", "embeddings", "lm_head", "experts", "allow_nonfinite", "alpha",
    "keep_last", "svd", "dtype", "calibrate", "calibration_tokens", "calibrate_kind", "calibration_hash",
    "seed", "max_shard_size", "meta_version",
}  # fmt: skip
FINGERPRINTS = [
    ({}, "4040dba2c8f22d682b0ede51cf4cc644572a08a7210f6695820aee7f727bf0f2"),
    (
        {"bits": 2.5, "alpha": 16, "rule": ["q_proj=4:8"]},
        "599e1afe695b8ab43d51866faad6f0bd554dcbf39edfdaf24dbd823ba7e6c277",
    ),
    (
        {"method": "qa-lora", "format": "gptq", "alpha": 16.0, "meta_version": 3.1, "max_shard_size": 6000000},
        "e840bd93e8da52593fec97c9ecede88b983bbebbc9e24287c6a524f03e97d4bd",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), FINGERPRINTS)
def test_fingerprints_are_those_of_0_1(fields: dict, expected: str) -> None:
    recipe = Recipe("m", **fields)
    # A later field changes the fingerprint; it must not change the values of the fields that were there before.
    counted = FIELDS_OF_0_1 - {"model", "revision", "calibrate"}
    values = {name: value for name, value in recipe.as_dict().items() if name in counted}
    assert hashlib.sha256(json.dumps([values, "s"], sort_keys=True).encode()).hexdigest() == expected
    assert set(recipe_fields()) >= FIELDS_OF_0_1
    assert recipe.fingerprint("s") == expected or set(recipe_fields()) > FIELDS_OF_0_1


def test_generated_files_are_current() -> None:
    for path, text in runpy.run_path(str(ROOT / "scripts" / "generate.py"))["generated"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python scripts/generate.py"


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_every_field_with_a_panel_is_a_flag(command: str) -> None:
    page = runner.invoke(app, [command, "--help-all"], env={"COLUMNS": "200"}).stdout
    assert [name for name, spec in recipe_specs().items() if not spec.flag] == ["model", "calibration_hash"]
    for spec in recipe_specs().values():
        for flag in filter(None, spec.flag.split("/")):
            assert re.search(rf"^  (-\w, )?([\w-]+, )?{flag}\b", page, re.MULTILINE), flag


def test_the_keywords_are_the_fields() -> None:
    keywords = get_type_hints(RecipeKeywords)
    assert list(keywords) == [name for name in recipe_fields() if name != "model"]
    for function in (loftq_cli.quantize, loftq_cli.plan):
        assert inspect.signature(function).parameters["recipe"].annotation == "Unpack[RecipeKeywords]"


CALLS = {
    "quantize('m', bits=2, rule=['q=4'], calibrate=None, alpha=16)": "",
    "plan('m', bits=2.5, rank=8, meta_version=3.1)": "",
    "quantize('m', bogus=3)": 'Unexpected keyword argument "bogus" for "quantize"',
    "plan('m', bogus=3)": 'Unexpected keyword argument "bogus" for "plan"',
    "quantize('m', rank='8')": 'Argument "rank" to "quantize" has incompatible type "str"',
}
# Only the signatures matter; checking everything they import would take a minute.
MYPY = """[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-loftq_cli,loftq_cli.api,loftq_cli.recipe.keywords]
follow_imports = silent
"""


def test_type_checkers_know_the_keywords(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text("import loftq_cli\n" + "".join(f"loftq_cli.{call}\n" for call in CALLS))
    (tmp_path / "mypy.ini").write_text(MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "snippet.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        timeout=300,
    )
    wrong = {number: said for number, said in enumerate(CALLS.values(), start=2) if said}
    assert done.returncode == 1 and f"Found {len(wrong)} errors in 1 file" in done.stdout, done.stdout + done.stderr
    for number, complaint in wrong.items():
        assert f"snippet.py:{number}: error: {complaint}" in done.stdout, done.stdout


def test_the_table_has_a_line_for_every_field() -> None:
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(recipe_fields())
    assert "| `rank` | `--rank` | integer, at least 1 | 16 | Rank of the adapter. |" in lines
    for name, line in zip(recipe_fields(), lines[2:]):
        assert line.startswith(f"| `{name}` |") and line.replace("\\|", "").count("|") == 6


def test_recipes_are_values() -> None:
    recipe = Recipe("m", rule="q=4")
    assert recipe == Recipe("m", rule=["q=4"]) and hash(recipe) == hash(Recipe("m", rule=("q=4",)))
    assert pickle.loads(pickle.dumps(recipe)).rules == recipe.rules
    with pytest.raises(AttributeError):
        recipe.bits = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 5}, "--bits cannot be 5: choose one of 2, 3, 4, 8, or a mean between them with --mix."),
        ({"rank": 2.0}, "--rank cannot be 2.0: give a whole number of at least 1."),
        ({"seed": 2**31}, "--seed cannot be 2147483648: give a whole number of at least 0."),
        ({"block_size": 64.0}, "--block-size cannot be 64.0: choose one of 32, 64, 128, 256."),
        ({"group_size": 48}, "--group-size cannot be 48: choose one of -1, 32, 64, 128, 256 (-1 is a whole row)."),
        ({"symmetric": 1}, "--symmetric cannot be 1: give true or false, or leave it out."),
        ({"calibration_hash": 3}, "calibration_hash cannot be 3: give a string."),
        ({"include": "a\0"}, "include contains an invalid character: correct 'a\\x00'."),
        ({"max_shard_size": 10**4500}, "--max-shard-size cannot be this int: give a size such as 5GB."),
        ({"rules": ()}, "a recipe has no field 'rules': the fields are model, revision, "),
    ],
)
def test_one_sentence_says_what_is_wrong_and_what_to_do(fields: dict, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe("m", **fields)
    assert str(caught.value).startswith(sentence)
