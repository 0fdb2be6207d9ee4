"""Sources: tensors equal those that safetensors reads; damaged files are reported in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.errors import ExitCode, LoftqError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with an index, several dtypes, an empty tensor."""
    first = {"a.weight": torch.randn(8, 4), "b": torch.arange(3), "empty": torch.empty(0, 4)}
    second = {"c.weight": torch.randn(4, 4).bfloat16(), "d": torch.tensor(True)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    index = {name: "model-00001-of-00002.safetensors" for name in first}
    index |= {name: "model-00002-of-00002.safetensors" for name in second}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("with_index", [True, False])
def test_tensors_are_what_safetensors_reads(sharded: Path, with_index: bool) -> None:
    if not with_index:
        (sharded / "model.safetensors.index.json").unlink()
    expected = {}
    for file in sharded.glob("*.safetensors"):
        expected |= load_file(file)
    checkpoint = open_checkpoint(sharded)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    checkpoint.close()


def test_tensors_outlive_the_checkpoint(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    tensor = checkpoint.read("a.weight")
    expected = tensor.clone()
    checkpoint.close()
    assert torch.equal(tensor, expected)


def test_fingerprints_of_different_sources_differ(sharded: Path) -> None:
    before = open_checkpoint(sharded).fingerprint
    assert open_checkpoint(sharded).fingerprint == before
    (sharded / "config.json").write_text('{"a": 1}')
    assert open_checkpoint(sharded).fingerprint != before


def header(length: int | None = None, **entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(start: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x00",
    "header longer than file": header(10**6, a=entry(0, 4)),
    "header of exabytes": header(2**63, a=entry(0, 4)),
    "no json": (4).to_bytes(8, "little") + b"{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "truncated data": header(a=entry(0, 8)) + b"1234",
    "trailing bytes": header(a=entry(0, 4)) + b"12345678",
    "overlap": header(a=entry(0, 8), b=entry(4, 12)) + b"x" * 12,
    "gap": header(a=entry(0, 4), b=entry(8, 12)) + b"x" * 12,
    "negative": header(a=entry(-4, 4)) + b"x" * 4,
    "shape lies": header(a=entry(0, 4, [2])) + b"x" * 4,
    "negative shape": header(a=entry(0, 4, [-1, -1])) + b"x" * 4,
    "endless product": header(a=entry(0, 4, [2**62] * 100_000)) + b"x" * 4,
    "endless strides": header(a=entry(0, 0, [0, 2**40, 2**40])),
    "unknown dtype": header(a=entry(0, 4, dtype="F7")) + b"x" * 4,
    "no offsets": header(a={"dtype": "F32", "shape": [1]}) + b"x" * 4,
    "entry is a list": header(a=[1, 2]) + b"x" * 4,
    "deep json": (60_000).to_bytes(8, "little") + b"[" * 60_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_headers_end_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(LoftqError) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"a.weight": "../model.safetensors"}}, "not a shard of this directory"),
        ({"weight_map": {"a.weight": "/etc/passwd"}}, "not a shard of this directory"),
        ({"weight_map": {"a.weight": "model-00009-of-00009.safetensors"}}, "is missing"),
        ({"weight_map": {"nowhere": "model-00001-of-00002.safetensors"}}, "does not hold it"),
        ({"weight_map": {"c.weight": "model-00001-of-00002.safetensors"}}, "does not hold it"),
        ({"weight_map": []}, "weight_map"),
        ({}, "weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_bad_indexes_end_in_one_sentence(sharded: Path, index: object, sentence: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoftqError, match=sentence):
        open_checkpoint(sharded)


def test_missing_files_are_named(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(LoftqError, match="there is no directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(LoftqError, match="is a file"):
        open_checkpoint(sharded / "config.json")
    shutil.copytree(sharded, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(LoftqError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{")
    with pytest.raises(LoftqError, match="not valid JSON"):
        open_checkpoint(tmp_path / "copy")
    empty = tmp_path / "no weights"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(LoftqError, match="contains no"):
        open_checkpoint(empty)


def test_a_file_cut_off_while_it_is_read_ends_in_one_sentence(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    file = sharded / checkpoint.tensors["a.weight"].file
    os.truncate(file, file.stat().st_size - 40)
    with pytest.raises(LoftqError, match=r"model-00001-of-00002\.safetensors was cut off while it was read") as caught:
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    checkpoint.close()


def test_files_that_are_replaced_by_fifos_are_not_waited_for(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    file = sharded / checkpoint.tensors["a.weight"].file
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(LoftqError, match=r"model-00001-of-00002\.safetensors is not a regular file"):
        checkpoint.read("a.weight")


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(LoftqError, match="is in both"):
        open_checkpoint(tmp_path)
