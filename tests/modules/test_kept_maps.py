"""Module maps that are kept in the cache folder: the same as those found anew, and never out of date."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from support.families import FAMILIES
from support.family_checkpoints import saved

from loftq_cli.machine.json_record import read_json
from loftq_cli.modules import kept_maps
from loftq_cli.modules.kept_maps import map_modules_once
from loftq_cli.modules.roles import ModuleMap, map_modules


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept maps, in a process that has not imported transformers as far as `map_modules_once` sees."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept_maps, "_transformers_is_imported", lambda: False)
    return tmp_path / "loftq" / "modules"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The config of every map that was found anew."""
    seen: list[dict] = []

    def counted(config: dict, shapes: dict) -> ModuleMap:
        seen.append(config)
        return map_modules(config, shapes)

    monkeypatch.setattr(kept_maps, "map_modules", counted)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kept_map_is_the_one_that_was_found(name: str, folder: Path, calls: list[dict]) -> None:
    checkpoint = saved(name)
    found = map_modules(checkpoint.config, checkpoint.shapes)
    for _ in range(2):
        assert map_modules_once(checkpoint.config, checkpoint.shapes) == found
    assert len(calls) == 1 and len(list(folder.iterdir())) == 1


def test_other_inputs_and_other_code_are_other_maps(
    folder: Path, calls: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    map_modules_once(config, shapes)
    map_modules_once({**config, "tie_word_embeddings": True}, shapes)
    map_modules_once(config, {name: shape for name, shape in shapes.items() if name != "lm_head.weight"})
    map_modules_once(config, dict(reversed(shapes.items())))  # roles are in the order of the checkpoint
    code = kept_maps._code()
    assert code is not None
    for change in range(len(code)):
        changed = [*code[:change], "another", *code[change + 1 :]]
        monkeypatch.setattr(kept_maps, "_code", lambda changed=changed: changed)
        map_modules_once(config, shapes)
    assert len(calls) == 4 + len(code) == len(list(folder.iterdir()))


def test_a_version_in_development_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_maps, "version", lambda package: "5.99.0.dev0")
    map_modules_once(saved("llama").config, saved("llama").shapes)
    assert not folder.exists()


def test_a_failure_is_not_kept(folder: Path) -> None:
    """A library that the class needs may be installed before the next run."""
    found = map_modules_once({"model_type": "unheard_of"}, {"a.weight": (64, 64)})
    assert found.unbuilt and not folder.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "nonsense", "directory", "pipe", "device"])
def test_a_damaged_file_is_found_anew(damage: str, folder: Path, calls: list[dict]) -> None:
    checkpoint = saved("llama")
    found = map_modules_once(checkpoint.config, checkpoint.shapes)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content.replace(b"q_proj", b"k_proj", 1))
    elif damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "nonsense":
        path.write_text(json.dumps({"sha256": "0" * 64, "map": "{}"}))
    else:
        path.unlink()
        make = {"directory": Path.mkdir, "pipe": os.mkfifo, "device": lambda place: place.symlink_to("/dev/zero")}
        make[damage](path)
    assert map_modules_once(checkpoint.config, checkpoint.shapes) == found and len(calls) == 2


def test_the_oldest_files_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_maps, "_MOST_FILES", 2)
    checkpoint = saved("llama")
    for length in (128, 256, 512):
        map_modules_once({**checkpoint.config, "max_position_embeddings": length}, checkpoint.shapes)
    assert len(list(folder.iterdir())) == 2


def test_a_process_that_has_imported_transformers_uses_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent))
    assert "transformers" in sys.modules
    map_modules_once(saved("llama").config, saved("llama").shapes)
    assert not folder.exists()


def test_every_field_survives_json() -> None:
    found = map_modules(saved("qwen3_moe").config, saved("qwen3_moe").shapes)
    assert read_json(ModuleMap, kept_maps._text(found)) == found
