"""`loftq.json`: any file either loads or ends in one sentence that names the field."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing

import loftq_cli
from loftq_cli._version import REQUIREMENT
from loftq_cli.artifacts.manifest import NAME, parse_manifest, render
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError

Change = Callable[[dict[str, Any]], object]
OTHER_FILE = {"nbytes": 1, "sha256": "0" * 64}


@pytest.fixture(scope="module")
def content(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("manifest") / "out"
    loftq_cli.quantize(random_llama, output=out, bits=2, rank=4, iters=2)
    return (out / NAME).read_bytes()


def refusal(content: bytes) -> str:
    with pytest.raises(LoftqError) as caught:
        parse_manifest(Path("out") / NAME, content)
    return str(caught.value)


def matrix(**fields: object) -> Change:
    return lambda values: values["matrices"][3].update(fields)


def file(name: str, **fields: object) -> Change:
    return lambda values: values["files"].update({name: {**OTHER_FILE, **fields}})


DAMAGE: dict[str, tuple[Change, str]] = {
    "text for a number": (matrix(rank="4"), "matrices[3].rank must be an integer, not '4'"),
    "float for an integer": (matrix(heads=4.0), "matrices[3].heads must be an integer, not 4.0"),
    "true for one": (matrix(rank=True), "matrices[3].rank must be an integer, not true"),
    "one for true": (matrix(nested=1), "matrices[3].nested must be true or false, not 1"),
    "bits": (matrix(bits=5), "matrices[3].bits must be one of 2, 3, 4 or 8, not 5"),
    "shape": (matrix(shape=[64]), "matrices[3].shape[1] is missing"),
    "three sides": (matrix(shape=[1, 2, 3]), "matrices[3].shape has 3 items but must have at most 2"),
    "fraction": (matrix(shape=[64, 0.5]), "matrices[3].shape[1] must be an integer, not 0.5"),
    "negative side": (matrix(shape=[64, -64]), "matrices[3].shape[1] must be at least 1, not -64"),
    "no shape": (matrix(shape=None), "matrices[3].shape must be a list, not null"),
    "endless": (matrix(rank=10**30), f"matrices[3].rank must be at most {2**63 - 1}, not 1{'0' * 30}"),
    "block": (matrix(block_size=0), "matrices[3] has block_size 0, which must be at least 1 for a codebook"),
    "scale": (
        matrix(scale_dtype="zzz"),
        "matrices[3].scale_dtype must be one of 'float32', 'bfloat16' or 'float16', not 'zzz'",
    ),
    "affine": (matrix(affine={"zero": "float"}), "matrices[3].affine.zero_dtype is missing"),
    "levels": (
        matrix(data_type="int"),
        "matrices[3] has only one of data_type 'int' and affine, which belong together",
    ),
    "unknown field": (matrix(colour="red"), "matrices[3].colour is not a known field"),
    "nan": (matrix(residual=float("nan")), "matrices[3].residual must be a finite number, not nan"),
    "infinity": (matrix(seconds=float("inf")), "matrices[3].seconds must be a finite number, not inf"),
    "negative residual": (matrix(residual=-0.5), "matrices[3].residual must be at least 0, not -0.5"),
    "expert": (matrix(expert=3), "matrices[3].expert must be an object, not 3"),
    "part of no expert": (
        matrix(expert={"index": 0, "count": 0}),
        "matrices[3].expert.count must be at least 1, not 0",
    ),
    "recipe": (lambda v: v.update(recipe=[1]), "recipe must be an object, not [1]"),
    "unknown choice": (lambda v: v["recipe"].update(bogus=1), "recipe has an unknown field 'bogus'"),
    "pooling": (
        lambda v: v["recipe"].update(method="qa-lora", group_size="x"),
        "recipe has the group_size 'x', which must be a positive integer for qa-lora",
    ),
    "alpha": (
        lambda v: v["recipe"].update(alpha=float("nan")),
        "recipe has a field alpha of a wrong type or a number that is not finite",
    ),
    "dtype": (lambda v: v.update(dtype="zip"), "dtype must be one of 'float32', 'bfloat16' or 'float16', not 'zip'"),
    "absolute": (file("/etc/x"), "files['/etc/x'] must be a relative path below the directory, not '/etc/x'"),
    "upwards": (file("a/../../x"), "files['a/../../x'] must be a relative path below the directory, not 'a/../../x'"),
    "size": (file("x", nbytes=-1), "files.x.nbytes must be at least 0, not -1"),
    "hash": (file("x", sha256="00"), "files.x.sha256 must be 64 hexadecimal digits, not '00'"),
    "no files": (lambda v: v.pop("files"), "files is missing"),
    "no matrices": (lambda v: v["matrices"].clear(), "matrices has 0 items but must have at least 1"),
    "totals": (lambda v: v["totals"].update(seconds="1"), "totals.seconds must be a number, not '1'"),
    "kept": (lambda v: v["kept"][0].update(shape=[-1]), "kept[0].shape[0] must be at least 0, not -1"),
    "notes": (lambda v: v.update(notes=[3]), "notes[0] must be a string, not 3"),
    "control characters": (lambda v: v.update({"\x1b[2J": 1}), "['\\x1b[2J'] is not a known field"),
    "version": (lambda v: v.update(manifest_version="x"), "manifest_version must be an integer, not 'x'"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_ends_in_a_sentence_that_names_file_and_field(what: str, content: bytes) -> None:
    change, said = DAMAGE[what]
    values = json.loads(content)
    change(values)
    assert refusal(json.dumps(values).encode()) == f"out/loftq.json is damaged ({said}): convert the model again."


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"{", b"[" * 200_000, b'{"a": ' + b"9" * 9000 + b"}", b'{"manifest_version": "\\ud800"}'],
    ids=["empty", "binary", "cut off", "deep", "a number of 9000 digits", "half a character"],
)
def test_text_that_is_not_json(text: bytes) -> None:
    assert refusal(text).startswith("out/loftq.json is damaged (it is not valid JSON: ")


@pytest.mark.parametrize(("text", "shown"), [(b"[]", "[]"), (b"null", "null"), (b'"x"', "'x'")])
def test_json_that_is_not_an_object(text: bytes, shown: str) -> None:
    assert f"damaged (the file's content must be an object, not {shown})" in refusal(text)


def test_a_newer_version_is_named_whatever_else_it_holds(content: bytes) -> None:
    values = {**json.loads(content), "manifest_version": 2, "matrices": {"new": True}, "more": [1]}
    said = refusal(json.dumps(values).encode())
    wanted = f"pip install -U '{REQUIREMENT}'"
    assert said == f"out/loftq.json was written by a newer loftq: run `{wanted}`."


def test_integers_stand_for_floats_and_rendering_gives_the_same_values(content: bytes) -> None:
    values = json.loads(content)
    assert json.loads(render(parse_manifest(Path(NAME), content))) == values
    values["totals"]["seconds"] = 3
    assert parse_manifest(Path(NAME), json.dumps(values).encode()).totals.seconds == 3.0


def test_ten_thousand_matrices_are_read_in_well_under_a_second(content: bytes) -> None:
    values = json.loads(content)
    one = values["matrices"][0]
    values["matrices"] = [{**one, "module": f"layers.{number}"} for number in range(10_000)]
    text, seconds = json.dumps(values).encode(), []
    for _ in range(5):  # a busy machine may slow some of them down
        started = time.process_time()
        assert len(parse_manifest(Path(NAME), text).matrices) == 10_000
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("name", ["loftq.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(random_llama, output=out, bits=4, rank=2, iters=1, include=("*.layers.0.*",))
    (out / name).unlink()
    os.mkfifo(out / name)
    for words in (("inspect", out), ("verify", out), ("merge", out, out / "loftq_init", "-o", tmp_path / "merged")):
        result = typer.testing.CliRunner().invoke(app, [str(word) for word in words])
        if words[0] != "inspect" or name == "loftq.json":
            assert result.exit_code in (1, 3) and "unexpected" not in result.stderr, (words, result.stderr)


def test_a_manifest_larger_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.artifacts import manifest

    monkeypatch.setattr(manifest, "_LARGEST", 100)
    (tmp_path / "loftq.json").write_text(" " * 101)
    with pytest.raises(LoftqError, match=r"loftq\.json has more than 100 bytes"):
        manifest.read_manifest(tmp_path)
