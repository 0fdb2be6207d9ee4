"""Nothing is lost: a killed run resumes to the same bytes, and an incomplete directory does not look like a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.interruptions import RECIPE, StopAfter, stop_after, tensors

import loftq_cli
from loftq_cli.api import plan as make_plan
from loftq_cli.engine.output.journal import Journal
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.progress import Reporter


@pytest.fixture(scope="module")
def uninterrupted(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    return tensors(out)


@pytest.mark.parametrize("units", [1, 5, 12])
def test_stopped_run_goes_on_to_the_same_bytes(units: int, uninterrupted, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(units, random_llama, out)
    assert [path.name for path in out.iterdir()] == [".loftq"], "unfinished work does not look like a model"
    taken_up = []

    class Watch(Reporter):
        def start(self, plan, finished) -> None:
            assert len(finished) >= units

        def working(self, unit) -> None:
            taken_up.append(unit.tensor)

    manifest = loftq_cli.quantize(random_llama, output=out, reporter=Watch(), **RECIPE)
    assert len(taken_up) < len(manifest.matrices) + len(manifest.kept), "finished units were not repeated"
    assert tensors(out) == uninterrupted and not (out / ".loftq").exists()
    assert len(manifest.matrices) == 14 and all(record.residuals for record in manifest.matrices)


def test_kill_minus_nine(uninterrupted, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "loftq_cli", "quantize", str(random_llama), "-o", str(out), "--quiet"]
    for name, value in RECIPE.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    journal = out / ".loftq" / "journal"
    for lines in (3, 9, 15):
        process = subprocess.Popen(words)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > lines:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == 0 or not (out / "config.json").exists()
    assert subprocess.run(words).returncode in (0, 2)  # 2: the last one had finished before the kill
    assert tensors(out) == uninterrupted


def test_damaged_units_and_torn_lines_are_repeated(uninterrupted, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(10, random_llama, out)
    plan = make_plan(random_llama, output=out, **RECIPE)
    victim = next(iter(Journal(out / ".loftq" / "journal").entries()))
    unit = next(unit for unit in plan.units if unit.tensor == victim)
    file = next(f for f in plan.files if unit.backbone[0].name in f.starts)
    with open(out / ".loftq" / "partial" / file.name, "r+b") as handle:
        handle.seek(file.starts[unit.backbone[0].name])
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 1]))
    with open(out / ".loftq" / "journal", "ab") as handle:
        handle.write(b'{"tensor": "model.norm.weight", "sha')
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert tensors(out) == uninterrupted


def test_stop_between_the_last_renames(uninterrupted, random_llama: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    moved = []
    replace = os.replace

    def tear(source, target, **folders) -> None:
        if len(moved) == 4:
            raise RuntimeError("stopped by the test")
        moved.append(target)
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", tear)
    with pytest.raises(RuntimeError):
        loftq_cli.quantize(random_llama, output=out, **RECIPE)
    monkeypatch.undo()
    assert len(moved) == 4 and not (out / "config.json").exists()
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert tensors(out) == uninterrupted and (out / "config.json").exists()


def test_another_recipe_on_an_unfinished_directory_is_refused(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(3, random_llama, out)
    with pytest.raises(UsageError, match=r"unfinished conversion with bits 2 \(now 4\), format packed \(now bnb\)"):
        loftq_cli.quantize(random_llama, output=out, **{**RECIPE, "bits": 4})
    loftq_cli.quantize(random_llama, output=out, overwrite=True, **{**RECIPE, "bits": 4})
    assert loftq_cli.read_manifest(out).recipe["bits"] == 4


def test_a_changed_source_is_refused_by_name_and_a_copy_is_not(uninterrupted, random_llama, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(random_llama, source)
    stop_after(3, source, out)
    weights, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    save_file({name: weight * 1.5 for name, weight in weights.items()}, source / "model.safetensors")
    with pytest.raises(UsageError, match=r"source/model\.safetensors is not the file that the unfinished conversion"):
        loftq_cli.quantize(source, output=out, **RECIPE)
    shutil.copyfile(random_llama / "model.safetensors", source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(UsageError, match=r"the config or the tensors' .* in .*source are not those"):
        loftq_cli.quantize(source, output=out, **RECIPE)
    moved = tmp_path / "moved"
    shutil.copytree(random_llama, moved)  # another path and other times, but the same content
    loftq_cli.quantize(moved, output=out, **RECIPE)
    assert tensors(out) == uninterrupted


def test_a_matrix_replaced_between_the_sampled_blocks_is_found(random_llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("loftq_cli.engine.output.source_sample.sample_file", lambda path: "the same")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(random_llama, source)
    stop_after(5, source, out)
    done = next(iter(Journal(out / ".loftq" / "journal").entries()))
    weights = bytearray((source / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(weights[:8], "little")
    start = header + json.loads(weights[8:header])[done]["data_offsets"][0]
    weights[start] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    with pytest.raises(UsageError, match=rf"model\.safetensors \({done} differs\) is not the file that the unfinished"):
        loftq_cli.quantize(source, output=out, **RECIPE)
    loftq_cli.quantize(source, output=out, overwrite=True, **RECIPE)
    assert loftq_cli.verify(out, source=source).ok


def test_comparing_a_source_that_looks_changed_is_reported(random_llama: Path, tmp_path: Path) -> None:
    source, out, compared = tmp_path / "source", tmp_path / "out", []
    shutil.copytree(random_llama, source)
    stop_after(5, source, out)
    os.utime(source / "model.safetensors", (1, 1))

    class Watch(Reporter):
        def comparing(self, done: int, total: int) -> None:
            compared.append((done, total))

    loftq_cli.quantize(source, output=out, reporter=Watch(), **RECIPE)
    assert len(compared) >= 5 and compared == [(done, len(compared)) for done in range(len(compared))]


def test_a_matrix_replaced_during_the_run_is_found(random_llama: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(random_llama, source)

    class Replace(StopAfter):
        def done(self, unit, record) -> None:
            self.left -= 1
            if self.left == 0:
                with open(source / "model.safetensors", "r+b") as handle:
                    handle.seek(unit.source.start)
                    byte = handle.read(1)[0]
                    handle.seek(unit.source.start)
                    handle.write(bytes([byte ^ 1]))

    with pytest.raises(LoftqError, match=r"model\.safetensors was changed while it was converted") as caught:
        loftq_cli.quantize(source, output=out, reporter=Replace(3), **RECIPE)
    assert caught.value.exit_code == ExitCode.INCOMPLETE and not (out / "config.json").exists()


def test_a_flipped_digit_of_the_journal_never_reaches_the_manifest(random_llama: Path, tmp_path: Path) -> None:
    out, ref = tmp_path / "out", tmp_path / "ref"
    loftq_cli.quantize(random_llama, output=ref, **RECIPE)
    stop_after(10, random_llama, out)
    journal = out / ".loftq" / "journal"
    content = bytearray(journal.read_bytes())
    content[content.rindex(b'"residual": 0.') + len(b'"residual": 0.') + 1] ^= 1
    journal.write_bytes(content)
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    now, before = loftq_cli.read_manifest(out), loftq_cli.read_manifest(ref)
    assert [record.residual for record in now.matrices] == [record.residual for record in before.matrices]


def test_finished_directories_are_kept(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    before = tensors(out)
    done = loftq_cli.read_manifest(out)
    assert loftq_cli.quantize(random_llama, output=out, **RECIPE) == done
    with pytest.raises(UsageError, match=r"finished conversion with rank 4 \(now 8\)"):
        loftq_cli.quantize(random_llama, output=out, **{**RECIPE, "rank": 8})
    assert tensors(out) == before
    loftq_cli.quantize(random_llama, output=out, overwrite=True, **{**RECIPE, "max_shard_size": "5GB"})
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]


def test_foreign_directories_and_files_are_left_alone(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not loftq's"):
            loftq_cli.quantize(random_llama, output=out, overwrite=overwrite, **RECIPE)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="is a file"):
        loftq_cli.quantize(random_llama, output=out / "thesis.txt", **RECIPE)


def test_full_disk_is_exit_4_and_the_same_call_goes_on(uninterrupted, random_llama, tmp_path, monkeypatch) -> None:
    out, written = tmp_path / "out", []
    pwrite = os.pwrite

    def fill(handle, data, position):
        written.append(len(data))
        if len(written) > 12:
            raise OSError(28, "No space left on device")
        return pwrite(handle, data, position)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(LoftqError, match=r"No space left on device.*run the same command again") as caught:
        loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    monkeypatch.undo()
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert tensors(out) == uninterrupted


def test_interrupt_leaves_exit_130_and_state(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"""
import os, signal
from loftq_cli.engine.compute import pipeline
convert = pipeline.convert
def interrupted(unit, *rest):
    if unit.matrix is not None and "layers.1" in unit.tensor:
        os.kill(os.getpid(), signal.SIGINT)
    return convert(unit, *rest)
pipeline.convert = interrupted
import sys
sys.argv = ["loftq", "quantize", {str(random_llama)!r}, "-o", {str(out)!r}, "--bits", "2"]
from loftq_cli.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert "run the same command again to resume" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == [".loftq"]
    assert Journal(out / ".loftq" / "journal").entries()
    loftq_cli.quantize(random_llama, output=out, bits=2)


def test_what_does_not_read_back_is_found_before_the_end_and_repeated(uninterrupted, random_llama, tmp_path) -> None:
    out = tmp_path / "out"

    class Rot(Reporter):
        """Flips a bit on disk after the unit was recorded."""

        def finishing(self, step) -> None:
            with open(out / ".loftq" / "partial" / "loftq_init" / "adapter_model.safetensors", "r+b") as handle:
                handle.seek(-1, os.SEEK_END)
                last = handle.read(1)[0]
                handle.seek(-1, os.SEEK_END)
                handle.write(bytes([last ^ 4]))

    with pytest.raises(LoftqError, match=r"does not hold what was written to it \(.*lora_") as caught:
        loftq_cli.quantize(random_llama, output=out, reporter=Rot(), **RECIPE)
    assert caught.value.exit_code == ExitCode.INCOMPLETE and not (out / "config.json").exists()
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert tensors(out) == uninterrupted
