"""The output directory of a merge has one owner, keeps the user's files, and allows an interrupted merge to repeat."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli.artifacts.manifest import MERGE_MARK
from loftq_cli.checkpoint.side_files import made_file
from loftq_cli.engine.output.directory import STATE, journal_of, partial_folder
from loftq_cli.engine.output.journal import Header
from loftq_cli.engine.output.lock import take
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.merging.output import start_merge
from loftq_cli.merging.texts import RECORD, MergeReport

NAMES = {"config.json", "model.safetensors", RECORD, "1_Pooling/config.json"}
COPIED = made_file("1_Pooling/config.json", b"1_Pooling/config.json")


@pytest.fixture(scope="module")
def backbone(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "out"
    loftq_cli.quantize(random_llama, output=out, bits=4, rank=2, iters=1, format="packed", include=("*.layers.0.*",))
    return out


def merge(backbone: Path, output: Path, **how: Any) -> MergeReport:
    return loftq_cli.merge(backbone, backbone / "loftq_init", output=output, **how)


def start(output: Path, *, overwrite: bool = False) -> None:
    (output / STATE).mkdir(parents=True, exist_ok=True)
    start_merge(output, NAMES, overwrite, [COPIED])


def fill(output: Path, *names: str) -> None:
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)


def entries(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()} - {STATE}


def test_one_of_two_merges_into_one_output_is_refused(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / STATE).mkdir(parents=True)
    lock = take(tmp_path / "out" / STATE)
    try:
        with pytest.raises(UsageError, match="out is being written by process"):
            merge(backbone, tmp_path / "out")
    finally:
        lock.release()
    merge(backbone, tmp_path / "out")
    assert not (tmp_path / "out" / STATE).exists()


def test_a_merge_does_not_drop_an_unfinished_conversion(tmp_path: Path) -> None:
    (tmp_path / STATE).mkdir()
    journal_of(tmp_path).begin(Header("1", {"bits": 4}))
    with pytest.raises(UsageError, match="holds an unfinished conversion: finish it"):
        start(tmp_path)
    assert journal_of(tmp_path).read_header() is not None
    start(tmp_path, overwrite=True)
    assert journal_of(tmp_path).read_header() is None and partial_folder(tmp_path).is_dir()


def test_an_unfinished_merge_says_so_and_is_repeated(tmp_path: Path) -> None:
    """A stop between the moves leaves files at their final places, which the same command replaces."""
    start(tmp_path)
    fill(tmp_path, RECORD, "model.safetensors", "1_Pooling/config.json", f"{STATE}/publishing")
    with pytest.raises(LoftqError, match=r"the merge into .* is not finished: run the same `loftq merge`") as caught:
        loftq_cli.read_manifest(tmp_path)
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    start(tmp_path)
    assert not entries(tmp_path)


def test_repeating_an_unfinished_merge_keeps_foreign_files(tmp_path: Path) -> None:
    start(tmp_path)
    fill(tmp_path, "model.safetensors", "mine.txt")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty: choose another -o"):
            start(tmp_path, overwrite=overwrite)
    assert entries(tmp_path) == {"model.safetensors", "mine.txt"}


def test_overwrite_removes_only_what_a_merge_writes(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", RECORD, "1_Pooling/config.json", "1_Pooling/mine.txt")
    with pytest.raises(UsageError, match=r"choose another -o, or move '1_Pooling/mine\.txt' away"):
        start(tmp_path, overwrite=True)
    (tmp_path / STATE / MERGE_MARK).write_text('["mine.txt", "config.json", "1_Pooling", "loftq_merge.json"]')
    with pytest.raises(UsageError, match="choose another -o, or move"):
        start(tmp_path)
    assert (tmp_path / "1_Pooling" / "mine.txt").exists() and (tmp_path / "config.json").exists()


def test_files_put_into_an_unfinished_merge_are_kept(tmp_path: Path) -> None:
    """A merge that has not begun to move its files has left nothing outside of its state."""
    start(tmp_path)
    fill(tmp_path, "model.safetensors")
    with pytest.raises(UsageError, match="is not empty: choose another -o"):
        start(tmp_path)
    assert entries(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_copied_file_that_was_changed_is_kept(overwrite: bool, tmp_path: Path) -> None:
    start(tmp_path)
    fill(tmp_path, RECORD, "1_Pooling/config.json", f"{STATE}/publishing")
    (tmp_path / "1_Pooling" / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"move '1_Pooling/config\.json' away, which is not known to be from a merge"):
        start(tmp_path, overwrite=overwrite)
    assert entries(tmp_path) == {RECORD, "1_Pooling"}


def test_the_record_shows_which_copies_are_a_merges(backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(backbone, out)
    copied = json.loads((out / RECORD).read_text())["files"]
    assert "generation_config.json" in copied and set(copied) <= {path.name for path in out.iterdir()}
    start(out, overwrite=True)  # a merge of another model, which has none of them
    assert not entries(out)
    merge(backbone, out)
    (out / "generation_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"move 'generation_config\.json' away"):
        start(out, overwrite=True)
    assert (out / "generation_config.json").read_text() == "{}" and (out / "config.json").exists()


def test_links_in_the_output_are_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    fill(elsewhere, "config.json", "merge")
    fill(out, RECORD)
    (out / "1_Pooling").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="move '1_Pooling' away"):
        start(out, overwrite=True)
    (out / "1_Pooling").unlink()
    (out / "config.json").symlink_to(elsewhere / "config.json")
    with pytest.raises(UsageError, match=r"move 'config\.json' away"):
        start(out, overwrite=True)
    (out / STATE).rmdir()
    (out / STATE).symlink_to(elsewhere)
    with pytest.raises(LoftqError, match="is a link"):
        start_merge(out, NAMES, overwrite=True)
    assert entries(elsewhere) == {"config.json", "merge"}


def test_a_finished_merge_is_replaced_only_on_request(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", RECORD, "model-00001-of-00002.safetensors", "1_Pooling/config.json")
    before = entries(tmp_path)
    with pytest.raises(UsageError, match="is not empty: give --overwrite to replace it"):
        start(tmp_path)
    assert entries(tmp_path) == before
    start(tmp_path, overwrite=True)
    assert not entries(tmp_path)


def test_a_stop_while_a_finished_merge_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config.json` goes first, and the command that was stopped can be repeated without --overwrite."""
    fill(tmp_path, "config.json", RECORD, "model-00001-of-00002.safetensors")
    unlink, count = ConfinedFolder.unlink, 0

    def stop(folder: ConfinedFolder, name: str) -> None:
        nonlocal count
        count += STATE not in name
        if count == 2:
            raise KeyboardInterrupt
        unlink(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(ConfinedFolder, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, overwrite=True)
    assert entries(tmp_path) == {RECORD, "model-00001-of-00002.safetensors"}
    start(tmp_path)
    assert not entries(tmp_path)


@pytest.mark.parametrize("where", ["weights", "texts"])
def test_full_disk(where: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    writes = {"weights": "tensorfile.writer._write_all", "texts": "engine.output.directory.write_file"}
    with monkeypatch.context() as patch:
        patch.setattr(f"loftq_cli.{writes[where]}", full)
        with pytest.raises(LoftqError, match=r"failed \(No space left on device\): make room, then run") as caught:
            merge(backbone, tmp_path / "out")
    assert caught.value.exit_code == ExitCode.INCOMPLETE and not entries(tmp_path / "out")
    merge(backbone, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_weights_are_read_back(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.merging import merge as module

    written = module.hash_tensors
    monkeypatch.setattr(module, "hash_tensors", lambda tensors: dict.fromkeys(written(tensors), "0" * 64))
    with pytest.raises(LoftqError, match="does not hold what was written to it") as caught:
        merge(backbone, tmp_path / "out")
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_refused_merge_leaves_nothing(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        merge(backbone, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
