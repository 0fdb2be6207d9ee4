"""Runs that cannot end well are refused before the first matrix, and files of others are never replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interruptions import RECIPE, stop_after, tensors

import loftq_cli
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.progress import Reporter

Usage = namedtuple("Usage", "total used free")


class NoWork(Reporter):
    """Fails if work on a matrix begins."""

    def working(self, unit) -> None:
        pytest.fail("work began")


@pytest.fixture
def model(random_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_llama, tmp_path / "model"))


def refuse(model: Path, output: Path, match: str, kind: type[LoftqError] = LoftqError, **more: object) -> LoftqError:
    with pytest.raises(kind, match=match) as caught:
        loftq_cli.quantize(model, output=output, reporter=NoWork(), **{**RECIPE, **more})
    return caught.value


def test_a_disk_that_is_too_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 9000, 9000))
    error = refuse(model, tmp_path / "out", r"out needs [\d.]+ kB, but its disk has only 9 kB for it: make room")
    assert error.exit_code == ExitCode.INCOMPLETE
    monkeypatch.undo()
    loftq_cli.quantize(model, output=tmp_path / "out", **RECIPE)


def test_a_resumed_run_counts_what_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(3, model, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 200_000, 200_000))
    loftq_cli.quantize(model, output=tmp_path / "out", **RECIPE)


@pytest.mark.parametrize("folder", [".loftq", "loftq_init", "LoftQ_init"])
def test_names_that_loftq_writes_are_not_taken_from_the_model(folder: str, model: Path, tmp_path: Path) -> None:
    (model / "modules.json").write_text(json.dumps([{"path": folder}]))
    (model / folder).mkdir()
    (model / folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4000}')
    try:
        loftq_cli.quantize(model, output=tmp_path / "out", **RECIPE)
    except LoftqError as error:
        assert "which loftq needs itself: rename it there" in str(error) and not (tmp_path / "out").exists()
    else:
        adapter = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
        assert adapter["lora_alpha"] != 4000 and loftq_cli.verify(tmp_path / "out").ok


def test_a_name_that_is_not_text(model: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(model) + b"/\xff\xfe.txt"))).write_text("x")
    refuse(model, tmp_path / "out", "not valid UTF-8|invalid|UTF-8")
    assert not (tmp_path / "out").exists()


def test_an_output_whose_name_is_not_text(model: Path, tmp_path: Path) -> None:
    refuse(model, Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), r"-o .* is not valid UTF-8", UsageError)


@pytest.mark.parametrize(
    "where", [".loftq/partial", ".loftq/partial/config.json", ".loftq/journal", ".loftq/partial/*"]
)
def test_links_in_the_state_lead_nowhere(where: str, model: Path, tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    stop_after(3, model, out)
    victim = next(out.glob(where))
    if victim.is_dir():
        shutil.move(victim, outside)
    else:
        outside.write_bytes(b"precious" * 1000)
        victim.unlink()
    victim.symlink_to(outside)
    before = {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()}
    for overwrite in (False, True):
        with pytest.raises(LoftqError, match="is a link"):
            loftq_cli.quantize(model, output=out, overwrite=overwrite, **RECIPE)
    assert {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()} == before


def test_a_state_folder_that_is_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "deep").mkdir(parents=True)
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".loftq").symlink_to(tmp_path / "home")
    for overwrite in (False, True):
        refuse(model, tmp_path / "out", r"\.loftq is a link", overwrite=overwrite)
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["deep", "thesis.txt"]


def test_a_state_folder_with_files_of_others(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "out" / ".loftq"
    (state / "photos").mkdir(parents=True)
    (state / "photos" / "one.jpg").write_text("precious")
    (state / "thesis.txt").write_text("precious")
    loftq_cli.quantize(model, output=tmp_path / "out", **RECIPE)
    assert sorted(path.name for path in state.rglob("*")) == ["one.jpg", "photos", "thesis.txt"]


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_a_file_where_the_partial_folder_should_be(make: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    stop_after(3, model, tmp_path / "out")
    partial = tmp_path / "out" / ".loftq" / "partial"
    shutil.rmtree(partial)
    make(partial)
    refuse(model, tmp_path / "out", r"(partial|config\.json).* cannot be used \(.*\): check it")


def test_a_hard_link_of_a_partial_file_is_not_written_through(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(3, model, out)
    partial = next((out / ".loftq" / "partial").glob("model*.safetensors"))
    os.link(partial, tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    loftq_cli.quantize(model, output=out, **RECIPE)
    assert (tmp_path / "backup").read_bytes() == before and loftq_cli.verify(out).ok


def test_overwrite_removes_only_what_is_proven_to_be_ours(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(model, output=out, **RECIPE)
    whole = tensors(out)
    (out / "notes.md").write_text("mine")
    (out / "loftq_init").rename(tmp_path / "elsewhere")
    (out / "loftq_init").symlink_to(tmp_path / "elsewhere")
    refuse(model, out, "loftq_init is a link", overwrite=True)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} > {"adapter_config.json"}
    (out / "loftq_init").unlink()
    (tmp_path / "elsewhere").rename(out / "loftq_init")
    assert tensors(out) == whole, "a refused --overwrite removes nothing"
    loftq_cli.quantize(model, output=out, overwrite=True, **RECIPE)
    assert tensors(out) == whole and (out / "notes.md").read_text() == "mine"


def test_a_changed_copy_of_a_model_s_file_is_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (model / "LICENSE").write_text("theirs")
    loftq_cli.quantize(model, output=out, **RECIPE)
    (out / "LICENSE").write_text("edited")
    refuse(model, out, r"LICENSE is not loftq's: move it away", UsageError, overwrite=True)
    (model / "LICENSE").unlink()
    loftq_cli.quantize(model, output=out, overwrite=True, **RECIPE)
    assert (out / "LICENSE").read_text() == "edited"


def test_a_file_put_into_an_unfinished_output_is_not_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(3, model, out)
    (out / "README.md").write_text("mine")
    refuse(model, out, r"README\.md is not loftq's", UsageError)
    assert (out / "README.md").read_text() == "mine"
