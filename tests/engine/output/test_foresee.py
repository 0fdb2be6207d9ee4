"""`loftq plan` says what `quantize` would do with the output directory as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.commands import runner
from support.interruptions import RECIPE, stop_after

import loftq_cli
from loftq_cli.cli import app
from loftq_cli.engine.output import resume
from loftq_cli.errors import UsageError


def notes(model: Path, output: Path, **recipe: object) -> list[str]:
    planned = {name: value for name, value in {**RECIPE, **recipe}.items() if name != "num_processes"}
    return [note for note in loftq_cli.plan(model, output=output, **planned).notes if "quantize" in note]  # type: ignore[arg-type]


def refused(model: Path, output: Path, **recipe: object) -> str:
    with pytest.raises(UsageError) as raised:
        loftq_cli.quantize(model, output=output, **{**RECIPE, **recipe})  # type: ignore[arg-type]
    return f"quantize would refuse: {raised.value}"


def test_empty_unfinished_finished_and_other(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert notes(random_llama, out) == []
    stop_after(3, random_llama, out)
    assert notes(random_llama, out) == [f"{out} holds an unfinished conversion with this recipe: quantize resumes it."]
    assert notes(random_llama, out, rank=8) == [refused(random_llama, out, rank=8)]
    loftq_cli.quantize(random_llama, output=out, **RECIPE)  # type: ignore[arg-type]
    done = f"{out} is finished already, with the same recipe: quantize has nothing to do."
    assert notes(random_llama, out) == [done]
    assert notes(random_llama, out, rank=8) == [refused(random_llama, out, rank=8)]
    next(out.glob("model*.safetensors")).unlink()
    assert "files of it are missing" in notes(random_llama, out)[0]
    assert notes(random_llama, out) == [refused(random_llama, out)]


def test_places_that_quantize_refuses(random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert notes(random_llama, tmp_path / "file") == [refused(random_llama, tmp_path / "file")]
    assert notes(random_llama, tmp_path) == [refused(random_llama, tmp_path)]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / ".loftq").write_text("a file")
    (note,) = notes(random_llama, tmp_path / "odd")
    assert "odd" in note and note.startswith("quantize would refuse: ")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "loftq.json").write_text("{")
    (note,) = notes(random_llama, tmp_path / "damaged")
    assert note.startswith("quantize would refuse: ") and "loftq.json" in note
    inside = random_llama / "out"
    assert notes(random_llama, inside) == [refused(random_llama, inside)] and not inside.exists()


def test_a_finished_output_is_left_alone_and_exits_0(random_llama: Path, tmp_path: Path) -> None:
    words = ["quantize", str(random_llama), "-o", str(tmp_path / "out"), "-b", "2", "-r", "4", "--iters", "1"]
    assert runner.invoke(app, words).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    result = runner.invoke(app, words)
    assert result.exit_code == 0 and "is finished already, with the same recipe: nothing to convert." in result.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_the_state_of_a_run_that_was_killed_at_its_very_end_is_removed(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = loftq_cli.quantize(random_llama, output=out, **RECIPE)  # type: ignore[arg-type]
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / ".loftq").mkdir()
    (out / ".loftq" / "publishing").touch()
    assert loftq_cli.quantize(random_llama, output=out, **RECIPE) == done  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert not (out / ".loftq").exists()
    (out / ".loftq").mkdir()
    loftq_cli.quantize(random_llama, output=out, **RECIPE)  # type: ignore[arg-type]
    assert not (out / ".loftq").exists(), "killed between two removals"
    (out / ".loftq").mkdir()
    for name in ("publishing", "push.json"):
        (out / ".loftq" / name).write_text("{}")
    loftq_cli.quantize(random_llama, output=out, **RECIPE)  # type: ignore[arg-type]
    assert [path.name for path in (out / ".loftq").iterdir()] == ["push.json"], "a push goes on where it stopped"


def test_a_damaged_manifest_is_not_taken_for_a_finished_output(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(random_llama, output=out, **RECIPE)  # type: ignore[arg-type]
    content = (out / "loftq.json").read_text()
    (out / "loftq.json").write_text(content.replace('"seconds": ', '"seconds": 1', 1))
    with pytest.raises(UsageError, match="files of it are missing, damaged or of another size"):
        loftq_cli.quantize(random_llama, output=out, **RECIPE)  # type: ignore[arg-type]


def test_a_rank_above_half_of_the_smaller_side_is_noted(random_llama: Path, tmp_path: Path) -> None:
    def about_rank(rank: int) -> list[str]:
        return [note for note in loftq_cli.plan(random_llama, output=tmp_path / "o", rank=rank).notes if "rank" in note]

    sides = [min(unit.matrix.shape) for unit in loftq_cli.plan(random_llama).matrices if unit.matrix]
    assert about_rank(min(sides) // 2) == []
    (note,) = about_rank(min(sides) // 2 + 1)
    assert note.startswith(f"rank {min(sides) // 2 + 1} is more than half of the smaller side of model.layers.0.")


def test_a_size_and_bits_contradict_each_other(random_llama: Path) -> None:
    with pytest.raises(UsageError, match="chooses the bits of every matrix: leave out --bits"):
        loftq_cli.plan(random_llama, bits=2, target_size="1GB")


@pytest.mark.parametrize("damage", ["pipe", "folder", "endless", "text", "journal"])
def test_a_plan_is_shown_for_an_output_that_cannot_be_read(damage: str, random_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / ".loftq").mkdir(parents=True)
    manifest = output / "loftq.json"
    if damage == "journal":
        os.mkfifo(output / ".loftq" / "journal")
    elif damage == "text":
        manifest.write_text("{")
    elif damage == "folder":
        manifest.mkdir()
    elif damage == "pipe":
        os.mkfifo(manifest)
    else:
        manifest.symlink_to("/dev/zero")
    (note,) = [note for note in notes(random_llama, output) if "would refuse" in note]
    assert str(output) in note and note.endswith(".") and ": " in note


def test_a_plan_is_shown_for_an_unreadable_output(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(self))

    made = loftq_cli.plan(random_llama, output=tmp_path / "out")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    assert resume.foresee(made, None) == (  # type: ignore[arg-type]
        f"quantize would refuse: {tmp_path / 'out'} cannot be read (Permission denied): choose another -o."
    )
