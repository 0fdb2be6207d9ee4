"""Files beside the weights: everything that belongs to the model, nothing from elsewhere, nothing in our places."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.checkpoint.side_files import find_side_files, left_behind
from loftq_cli.engine.output.directory import write_file
from loftq_cli.errors import LoftqError


@pytest.fixture
def model(random_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_llama, tmp_path / "model"))


def names(model: Path) -> set[str]:
    return {side.name for side in find_side_files(model)}


def modules(model: Path, *folders: str) -> None:
    (model / "modules.json").write_text(json.dumps([{"path": folder} for folder in ("", *folders)]))


def test_weights_of_modules_and_chat_templates_come_along(model: Path) -> None:
    modules(model, "2_Dense")
    for name in ("2_Dense/model.safetensors", "2_Dense/deep/config.json", "additional_chat_templates/tool_use.jinja"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    (model / "other").mkdir()
    (model / "other" / "config.json").write_text("{}")
    found = {name for name in names(model) if "/" in name}
    assert found == {
        "2_Dense/model.safetensors",
        "2_Dense/deep/config.json",
        "additional_chat_templates/tool_use.jinja",
    }


def test_files_that_a_class_reads_come_along_and_others_are_listed(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')
    for name in ("bpe.codes", "optimizer.pt", "modeling_mine.py"):
        (model / name).write_text("x")
    assert "bpe.codes" in names(model) and not names(model) & {"optimizer.pt", "modeling_mine.py"}
    assert left_behind(model, ["model.safetensors"]) == ["modeling_mine.py", "optimizer.pt"]
    (model / "runs").mkdir()
    assert left_behind(model, ["model.safetensors"]) == ["modeling_mine.py", "optimizer.pt", "runs/"]
    (model / "runs").rmdir()
    assert any("not copied" in note and "optimizer.pt" in note for note in loftq_cli.plan(model).notes)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_mine.Mine"}}))
    assert "modeling_mine.py" in names(model)


@pytest.mark.parametrize("folder", ["loftq_init", "LoftQ_Init", ".loftq", ".git"])
def test_modules_cannot_take_our_folders(folder: str, model: Path) -> None:
    modules(model, folder)
    with pytest.raises(LoftqError, match=rf"modules\.json names the folder '{re.escape(folder)}', which loftq needs"):
        loftq_cli.plan(model)


@pytest.mark.parametrize("name", ["README.md", "loftq.json", "loftq.yaml", "LOFTQ.json", "loftq_merge.json"])
def test_our_files_are_not_copied(name: str, model: Path) -> None:
    (model / name).write_text("{}")
    assert name not in names(model)


@pytest.mark.parametrize(
    "linked", ["1_Pooling", "1_Pooling/deep", "1_Pooling/config.json", "additional_chat_templates"]
)
def test_links_out_of_the_model_are_refused(linked: str, model: Path, tmp_path: Path) -> None:
    modules(model, "1_Pooling")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text('{"token": 1}')
    (model / linked).parent.mkdir(exist_ok=True)
    os.symlink(secret / "config.json" if linked.endswith(".json") else secret, model / linked)
    with pytest.raises(LoftqError, match=r"is a link"):
        find_side_files(model)


def test_only_this_models_blobs_may_be_linked(random_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(random_llama, model)
    for owner in ("a--b", "a--private"):
        blobs = tmp_path / f"models--{owner}" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / "x").write_text("content")
    os.symlink(tmp_path / "models--a--b" / "blobs" / "x", model / "LICENSE.txt")
    assert next(side for side in find_side_files(model) if side.name == "LICENSE.txt").read() == b"content"
    os.symlink(tmp_path / "models--a--private" / "blobs" / "x", model / "NOTICE.txt")
    with pytest.raises(LoftqError, match=r"NOTICE\.txt is a link to .*, outside of the model"):
        find_side_files(model)


def test_a_fifo_beside_the_weights_is_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "vocab.txt")
    assert "vocab.txt" not in names(model)
    os.mkfifo(model / "modules.json")
    with pytest.raises(LoftqError, match=r"modules\.json is not a file"):
        names(model)


def test_large_side_files_are_copied_in_pieces(model: Path, tmp_path: Path) -> None:
    with open(model / "notes.txt", "wb") as file:
        file.truncate(9 << 20)
    side = next(side for side in find_side_files(model) if side.name == "notes.txt")
    asked: list[int] = []
    (tmp_path / "out").mkdir()

    class Watched:
        def __init__(self) -> None:
            self.handle = side.open()

        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return self.handle.read(size)

    assert write_file(tmp_path / "out", "notes.txt", Watched()).nbytes == 9 << 20  # type: ignore[arg-type]
    assert all(0 < size <= 1 << 20 for size in asked)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_stale_index_is_ignored_as_transformers_does(kind: str, model: Path) -> None:
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    if kind == "bin":
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(model / "model.safetensors"), model / single)
        (model / "model.safetensors").unlink()
    before = open_checkpoint(model).fingerprint
    index = {"weight_map": {"model.norm.weight": f"gone-00001-of-00002.{kind}"}}
    (model / f"{single}.index.json").write_text(json.dumps(index))
    assert open_checkpoint(model).fingerprint == before
    assert any(f"{single}.index.json is ignored" in note for note in loftq_cli.plan(model).notes)


def test_adapters_are_named(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (model / "adapter_model.safetensors").write_bytes(b"never opened")
    assert any(
        "adapter_config.json in" in note and "only the base model" in note for note in loftq_cli.plan(model).notes
    )
    (model / "model.safetensors").unlink()
    with pytest.raises(LoftqError, match=r"is a PEFT adapter of org/base: give that model"):
        loftq_cli.plan(model)


def test_a_module_folder_whose_name_is_too_long(model: Path) -> None:
    (model / "modules.json").write_text(json.dumps([{"path": "x" * 5000}]))
    with pytest.raises(LoftqError, match=r"modules\.json names a folder of 5000 characters, which is too long"):
        find_side_files(model)
