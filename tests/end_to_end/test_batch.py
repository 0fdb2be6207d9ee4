"""Batches: many recipes in real processes, with every way a recipe can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer.testing
import yaml
from support.hub_server import talking_to
from support.hub_write_server import WriteHub

import loftq_cli
from loftq_cli.batches.child import Ended, _environment, _error
from loftq_cli.batches.expand import read_jobs
from loftq_cli.batches.report import BatchReport, Outcome, junit, markdown
from loftq_cli.batches.run import BatchReporter
from loftq_cli.cli import app
from loftq_cli.cli.batch import _sigterm_as_ctrl_c
from loftq_cli.errors import UsageError
from loftq_cli.progress import Reporter

runner = typer.testing.CliRunner()
QUICK = {"bits": 2, "rank": 4, "iters": 1}
SLOW = {**QUICK, "bits": 4, "iters": 600}  # at 2 bits, this many steps may diverge, which stops the iteration


def write(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def stop_halfway(source: Path, output: Path, **recipe: object) -> None:
    class Stop(Reporter):
        left = 5

        def done(self, unit, record) -> None:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("stopped by the test")

    with pytest.raises(RuntimeError, match="stopped by the test"):
        loftq_cli.quantize(source, output=output, reporter=Stop(), device="cpu", **recipe)


def bytes_of(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.safetensors")}


def test_good_broken_finished_and_half_done(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(random_llama)
    loftq_cli.quantize(model, output="whole", device="cpu", **QUICK, seed=1)
    stop_halfway(random_llama, tmp_path / "half", **QUICK, seed=2)
    untouched = (tmp_path / "whole/loftq.json").stat().st_mtime_ns
    files = [
        write(tmp_path / "good.yaml", model=model, **QUICK, output="good"),
        write(tmp_path / "broken.yaml", model=str(tmp_path / "nowhere"), **QUICK),
        write(tmp_path / "typo.yaml", model=model, bitz=2),
        write(tmp_path / "whole.yaml", model=model, **QUICK, seed=1, output="whole"),
        write(tmp_path / "half.yaml", model=model, **QUICK, seed=2, output="half"),
    ]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    words = ["batch", *map(str, files), "--summary", "out/s.json", "--junit", "out/j.xml", "--device", "cpu", "-j", "2"]
    result = runner.invoke(app, words)
    assert result.exit_code == 1, (result.output, result.exception)

    report = json.loads((tmp_path / "out/s.json").read_text())
    assert [one["status"] for one in report["recipes"]] == ["done", "failed", "failed", "finished", "done"]
    assert [one["resumed"] for one in report["recipes"]] == [False, False, False, False, True]
    assert [one["exit_code"] for one in report["recipes"]] == [0, 1, 2, None, 0]
    assert report["counts"] == {"done": 2, "finished": 1, "failed": 2} and not report["ok"] and report["exit_code"] == 1
    good, broken, typo, whole, half = report["recipes"]
    assert "there is no directory" in broken["error"] and "did you mean bits?" in typo["error"]
    assert "Traceback" not in broken["error"]
    for one in (good, whole, half):
        totals = loftq_cli.read_manifest(one["output"]).totals
        assert (one["residual"], one["matrices"], one["format"]) == (totals.residual, 14, "packed")
        assert one["output_bytes"] == totals.backbone_bytes + totals.adapter_bytes and one["error"] is None
    assert (tmp_path / "whole/loftq.json").stat().st_mtime_ns == untouched
    assert not (tmp_path / "half/.loftq").exists() and len(bytes_of(tmp_path / "half")) == 2

    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for name, words in (("good", "done"), ("whole", "finished"), ("half", "done, resumed"), ("typo", "failed")):
        assert words in lines[name], result.stdout
    assert "2 done, 1 finished, 2 failed of 5" in result.stdout and "there is no directory" in result.stdout
    assert "good: " in result.stderr and "14 matrices" in result.stderr and "/5] " in result.stderr
    assert "resuming: " in result.stderr

    suite = ElementTree.parse(tmp_path / "out/j.xml").getroot().find("testsuite")
    assert suite is not None and suite.get("tests") == "5" and suite.get("failures") == "2"
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed == [broken["name"], "typo"]
    step = (tmp_path / "step.md").read_text()
    assert step.count("✅") == 3 and step.count("❌") == 2 and "| `good` | 2." in step
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"s.json", "j.xml"}


def test_a_killed_process_does_not_stop_the_batch(random_llama: Path, tmp_path: Path) -> None:
    slow = write(tmp_path / "slow.yaml", model=str(random_llama), **SLOW, output=str(tmp_path / "a"))
    quick = write(tmp_path / "quick.yaml", model=str(random_llama), **QUICK, output=str(tmp_path / "b"))
    journal = tmp_path / "a/.loftq/journal"

    def kill() -> None:
        wait_for(lambda: journal.is_file() and journal.read_bytes().count(b"\n") > 3)
        (child,) = children_of(os.getpid(), "quantize")
        os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = loftq_cli.batch([slow, quick], device="cpu")
    killer.join()
    assert [one.status for one in report.outcomes] == ["incomplete", "done"] and report.exit_code == 4
    assert "SIGKILL" in (report.outcomes[0].error or "") and report.outcomes[0].exit_code == -signal.SIGKILL
    again = loftq_cli.batch([slow, quick], device="cpu")
    assert [(one.status, one.resumed) for one in again.outcomes] == [("done", True), ("finished", False)]
    assert again.exit_code == 0 and not again.interrupted


def test_ctrl_c_keeps_everything(random_llama: Path, tmp_path: Path) -> None:
    slow = write(
        tmp_path / "slow.yaml",
        matrix={"model": [str(random_llama)], "seed": [1, 2, 3]},
        **{**SLOW, "iters": 2000},
        output=str(tmp_path / "s{seed}"),
    )
    words = [sys.executable, "-m", "loftq_cli", "batch", str(slow), "-j", "2", "--device", "cpu"]
    process = subprocess.Popen(
        [*words, "--summary", str(tmp_path / "s.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journals = [tmp_path / f"s{seed}/.loftq/journal" for seed in (1, 2)]
    wait_for(lambda: all(path.is_file() and path.read_bytes().count(b"\n") > 2 for path in journals))
    children = children_of(process.pid, "quantize")
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "run the same command again" in said.splitlines()[-1] and "3 interrupted of 3" in out
    report = json.loads((tmp_path / "s.json").read_text())
    assert [one["status"] for one in report["recipes"]] == ["interrupted"] * 3 and report["exit_code"] == 130
    assert all(path.is_file() for path in journals) and not (tmp_path / "s3").exists()
    assert len(children) == 2 and not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "s1/config.json").exists()


def test_sigterm_is_treated_as_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def wait_for(ready) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


def children_of(pid: int, word: str) -> list[int]:
    """Processes that `pid` started, directly, with a word in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) if folder.name.isdigit() else 0
            if parent == pid and word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_matrix_gives_a_job_for_each_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(
        tmp_path / "m.yaml",
        matrix={"model": ["org/Tiny-7b", "org/Tiny-13b"], "bits": [4, 2], "data-type": ["nf", "uniform"]},
        rank=64,
        push_to="me/{name}",
    )
    jobs = read_jobs([file], "converted")
    assert [job.name for job in jobs] == [
        f"Tiny-{size}-loftq-{bits}bit-r64-{levels}"
        for size in ("7b", "13b")
        for bits in (4, 2)
        for levels in ("nf", "uniform")
    ]
    assert jobs[3].recipe == {"model": "org/Tiny-7b", "bits": 2, "data_type": "uniform", "rank": 64}
    assert jobs[3].output == Path("converted/Tiny-7b-loftq-2bit-r64-uniform")
    assert jobs[3].push_to == "me/Tiny-7b-loftq-2bit-r64-uniform"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"output": "o", "model": "a/b"}, ["o"]),
        ({"model": "a/b", "bits": 2}, ["b-loftq-2bit-r16"]),
        (
            {"matrix": {"seed": [0, 1]}, "model": "a/b", "output": "o"},
            ["b-loftq-4bit-r16-seed0", "b-loftq-4bit-r16-seed1"],
        ),
        ({"matrix": {"seed": [0, 1]}, "model": "a/b", "output": "o/{model}-{seed}-{bits}"}, ["b-0-4", "b-1-4"]),
        ({"matrix": {"seed": [0, 1]}, "model": "a/b", "output": "o/{seed:02d}{{}}"}, ["00{}", "01{}"]),
        (
            {"matrix": {"keep_last": [True, False]}, "model": "b"},
            ["b-loftq-4bit-r16-keep_last", "b-loftq-4bit-r16-no-keep_last"],
        ),
        (
            {"matrix": {"rule": [["q=2"], ["k=2"]]}, "model": "b"},
            ["b-loftq-4bit-r16-rule-q-2", "b-loftq-4bit-r16-rule-k-2"],
        ),
    ],
)
def test_default_names_are_readable(fields: dict[str, object], names: list[str], tmp_path: Path) -> None:
    assert [job.name for job in read_jobs([write(tmp_path / "f.yaml", **fields)])] == names


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"matrix": {"bits": 2}, "model": "m"}, "must be a list"),
        ({"matrix": {"bits": []}, "model": "m"}, "must be a list"),
        ({"matrix": [], "model": "m"}, "must be a mapping"),
        ({"matrix": {"bitz": [2]}, "model": "m"}, "not a field of a recipe"),
        ({"matrix": {"bits": [2]}, "bits": 4, "model": "m"}, "sets bits twice"),
        ({"matrix": {"bits": [2]}}, "no model"),
        ({"matrix": {"bits": [2]}, "model": "m", "output": "{nonsense}"}, "braces"),
        ({"matrix": {"bits": [2]}, "model": "m", "output": "x{bits:>4000000000}"}, "a width of two digits"),
        ({"matrix": {"bits": [2]}, "model": "m", "output": "x{bits:>{rank}}"}, "a width of two digits"),
        ({"matrix": {"bits": [2]}, "model": "m", "push_to": "x{model.__class__}"}, "braces"),
        ({"matrix": {"bits": [2]}, "model": "m", "output": "{model!r}"}, "braces"),
        ({"matrix": {"bits": [2]}, "model": "m", "output": "{bits:.999999999f}"}, "braces"),
        (
            {"matrix": {name: list(range(100)) for name in ("rank", "seed", "iters")}, "model": "m"},
            "1e+06 combinations",
        ),
        ({"model": "m", "output": "a\0b"}, "invalid character"),
        ({"model": "m", "output": "~nobody-here/x"}, "home directory"),
        ({"model": "m", "output": "x" * 5000}, "too long"),
        ({"model": "m", "output": 3}, "not a valid output or push_to"),
        ({"model": "m", "bits": 5}, "line 2: bits cannot be 5"),
    ],
)
def test_invalid_files_are_reported(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    (job,) = read_jobs([write(tmp_path / "f.yaml", **fields)])
    assert job.problem is not None and said in job.problem
    assert loftq_cli.batch([tmp_path / "f.yaml"]).exit_code == 1


def test_an_invalid_value_of_a_matrix_does_not_affect_the_others(tmp_path: Path) -> None:
    jobs = read_jobs([write(tmp_path / "f.yaml", matrix={"bits": [4, 5]}, model="m"), tmp_path / "missing.yaml"])
    assert [job.problem is None for job in jobs] == [True, False, False] and "cannot be read" in (jobs[2].problem or "")


def test_two_recipes_cannot_share_an_output(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.yaml", model="m", output="same") for name in ("one", "two"))
    with pytest.raises(UsageError, match="would both write to same"):
        read_jobs([one, two])
    with pytest.raises(UsageError, match="no recipe file"):
        read_jobs([])
    assert runner.invoke(app, ["batch", str(one), str(two)]).exit_code == 2
    assert runner.invoke(app, ["batch", str(one), "--jobs", "0"]).exit_code == 2
    assert runner.invoke(app, ["batch"]).exit_code == 2


def test_a_dry_run_plans_and_writes_nothing(random_llama: Path, tmp_path: Path) -> None:
    matrix = {"bits": [2, 3]}
    file = write(tmp_path / "m.yaml", model=str(random_llama), rank=4, matrix=matrix, output=str(tmp_path / "o"))
    result = runner.invoke(app, ["batch", str(file), "--dry-run", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["counts"] == {"planned": 2} and result.stderr == ""
    plan = loftq_cli.plan(random_llama, bits=3, rank=4)
    assert report["recipes"][1]["output_bytes"] == plan.backbone_bytes + plan.adapter_bytes
    assert not (tmp_path / "o").exists()


def test_a_recipe_file_names_its_output(random_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "f.yaml", model=str(random_llama), **QUICK, output=str(tmp_path / "from-file"))
    assert loftq_cli.plan(config=file).output == tmp_path / "from-file"
    assert loftq_cli.plan(config=file, output=tmp_path / "given").output == tmp_path / "given"
    loftq_cli.quantize(config=file, device="cpu")
    assert "output" not in yaml.safe_load((tmp_path / "from-file/loftq.yaml").read_text())
    file = write(tmp_path / "m.yaml", model=str(random_llama), matrix={"bits": [2]})
    with pytest.raises(UsageError, match="run it with `loftq batch"):
        loftq_cli.plan(config=file)
    file = write(tmp_path / "n.yaml", model=str(random_llama), output=7)
    with pytest.raises(UsageError, match=r"output in .* cannot be 7"):
        loftq_cli.plan(config=file)


def test_another_recipe_in_a_finished_output_fails_and_overwrite_helps(random_llama: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(random_llama, output=tmp_path / "o", device="cpu", **QUICK)
    file = write(tmp_path / "f.yaml", model=str(random_llama), **{**QUICK, "bits": 3}, output=str(tmp_path / "o"))
    report = loftq_cli.batch([file], device="cpu")
    assert report.exit_code == 1 and "bits 2 (now 3)" in (report.outcomes[0].error or "")
    report = loftq_cli.batch([file], device="cpu", overwrite=True)
    assert report.exit_code == 0 and report.outcomes[0].status == "done"


def test_a_finished_recipe_is_pushed(random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loftq_cli.quantize(random_llama, output=tmp_path / "o", device="cpu", **QUICK)
    file = write(
        tmp_path / "f.yaml", model=str(random_llama), **QUICK, output=str(tmp_path / "o"), push_to="some-org/Tiny"
    )
    with WriteHub() as hub, talking_to(hub, tmp_path / "home", monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        report = loftq_cli.batch([file], device="cpu")
        assert [one.status for one in report.outcomes] == ["finished"], report.outcomes
        assert "loftq.json" in hub.files("some-org/Tiny") and report.outcomes[0].push_to == "some-org/Tiny"
        monkeypatch.delenv("HF_TOKEN")
        report = loftq_cli.batch([file], device="cpu")
    assert report.exit_code == 1 and "nobody is logged in" in (report.outcomes[0].error or "")


def outcomes(*statuses: str) -> tuple[Outcome, ...]:
    return tuple(Outcome("n", "f", "o", status) for status in statuses)


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (("done", "finished"), 0),
        (("planned",), 0),
        (("done", "failed"), 1),
        (("incomplete", "failed"), 1),
        (("done", "incomplete"), 4),
    ],
)
def test_exit_codes(statuses: tuple[str, ...], code: int) -> None:
    assert BatchReport(outcomes(*statuses), 1.0).exit_code == code
    assert BatchReport(outcomes(*statuses), 1.0, interrupted=True).exit_code == 130


def test_reports_can_hold_any_error_text() -> None:
    odd = Outcome("n|<&", "f", "o", "failed", error="a \x1b[31m<red>\x00 & | line\nbreak")
    report = BatchReport((odd, *outcomes("interrupted", "incomplete")), 1.0)
    suite = ElementTree.fromstring(junit(report)).find("testsuite")
    assert suite is not None and suite.find("testcase/failure").get("message", "").startswith(
        "a \\x1b[31m<red>\\x00 & | line\\nbreak"
    )
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("1", "1", "1")
    assert len(markdown(report).splitlines()) == 4 + 3


def test_reports_escape_names(tmp_path: Path) -> None:
    odd = Outcome("a\x1b[2J`|\u202e", "f\x07", "o\x1b", "done", push_to=None)
    report = BatchReport((odd, Outcome("[x](y) <b>", "f", "o", "failed", error="<img> [x](y) `z`")), 1.0)
    cases = list(ElementTree.fromstring(junit(report)).iter("testcase"))
    assert (cases[0].get("name"), cases[0].get("classname")) == ("a\\x1b[2J`|\\u202e", "f\\x07")
    assert cases[0].findtext("system-out") == "done: o\\x1b"
    rows = markdown(report).splitlines()[4:]
    assert rows[0].startswith(r"| ✅ | a\\x1b\[2J\`\|\\u202e |") and rows[1].startswith("| ❌ | `[x](y) <b>` |")
    assert rows[1].endswith(r" | &lt;img&gt; \[x\](y) \`z\` |")


def test_reports_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file/s.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            loftq_cli.batch([tmp_path / "missing.yaml"], summary=path)


def test_fifos_and_endless_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    jobs = read_jobs([tmp_path / "fifo.yaml", tmp_path / "link.yaml"])
    assert all("not a regular file" in (job.problem or "") for job in jobs)


def test_a_process_that_dies_without_a_sentence() -> None:
    assert _error(0, []) is None and _error(1, ["loftq: first", "loftq: what  happened", "other"]) == "what happened"
    assert _error(1, ["Traceback", "ValueError: x"]) == "ValueError: x" and "exited with code 1 and no message" in (
        _error(1, []) or ""
    )
    assert "SIGSEGV" in (_error(-signal.SIGSEGV, []) or "") and Ended(0, None).error is None


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert "OMP_NUM_THREADS" not in _environment(1)
    assert _environment(10**6)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert _environment(10**6)["OMP_NUM_THREADS"] == "7"


def test_reporters_are_silent_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loftq_cli.batch([tmp_path / "missing.yaml"], reporter=BatchReporter())
    assert capsys.readouterr() == ("", "")
