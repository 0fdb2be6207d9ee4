"""An output has one owner: a second run is refused with the host and process, and one takes over a dead one's lock."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.interruptions import RECIPE, tensors

import loftq_cli
from loftq_cli.engine.output import lock as lock_module
from loftq_cli.engine.output.lock import STALE_SECONDS, Holder, take
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.progress import Reporter


def leave(folder: Path, number: int = 1, *, age: float = 0.0, **changes: object) -> Path:
    """Write a lock that another process holds or left behind."""
    path = folder / f"lock.{number}"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Holder.me(), **changes))))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def a_dead_process() -> tuple[int, float]:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    started = psutil.Process(process.pid).create_time()
    process.wait()
    return process.pid, started


def test_a_second_run_is_refused_at_once_with_host_and_process(random_llama: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", []

    class Second(Reporter):
        def working(self, unit) -> None:
            if not said:
                command = [sys.executable, "-m", "loftq_cli", "quantize", str(random_llama), "-o", str(out), "--bits=2"]
                said.append(subprocess.run(command, capture_output=True, text=True, timeout=120))
                with pytest.raises(UsageError, match=rf"being written by process {os.getpid()} on "):
                    loftq_cli.quantize(random_llama, output=out, **RECIPE)

    loftq_cli.quantize(random_llama, output=out, reporter=Second(), **RECIPE)
    assert said[0].returncode == ExitCode.USAGE
    assert f"is being written by process {os.getpid()} on {Holder.me().host}" in said[0].stderr
    assert not (out / ".loftq").exists(), "the lock is given back"


def test_the_lock_of_a_dead_process_and_of_a_reused_number_is_stale(tmp_path: Path) -> None:
    pid, started = a_dead_process()
    for changes in ({"pid": pid, "started": started}, {"started": Holder.me().started - 60}):
        leave(tmp_path, **changes)
        take(tmp_path).release()
        assert list(tmp_path.iterdir()) == []
    leave(tmp_path)
    with pytest.raises(UsageError, match=str(os.getpid())):
        take(tmp_path)


def test_the_lock_of_another_host_counts_until_its_heart_stops(tmp_path: Path) -> None:
    leave(tmp_path, host="node7", place="node7 another boot", pid=4711)
    with pytest.raises(UsageError, match="by process 4711 on node7"):
        take(tmp_path)
    leave(tmp_path, age=STALE_SECONDS + 1, host="node7", place="node7 another boot", pid=4711)
    take(tmp_path).release()
    (tmp_path / "lock.1").write_bytes(b"{")  # damaged
    with pytest.raises(UsageError, match=r"may be in use, .*/lock\.1 is damaged \(it is not valid JSON: "):
        take(tmp_path)
    os.utime(tmp_path / "lock.1", (1, 1))
    take(tmp_path).release()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pid": "x"}, r"pid must be an integer, not 'x'"),
        ({"pid": -1}, r"pid must be at least 0, not -1"),
        ({"pid": 2**31}, r"pid must be at most 2147483647"),
        ({"started": float("nan")}, r"started must be a finite number, not nan"),
        ({"more": 1}, r"more is not a known field"),
    ],
)
def test_a_damaged_lock_is_named_with_its_field_until_it_expires(fields: dict, said: str, tmp_path: Path) -> None:
    path = leave(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(UsageError, match=rf"lock\.1 is damaged \({said}.*\): try again in 2 minutes"):
        take(tmp_path)
    os.utime(path, (1, 1))
    take(tmp_path).release()


def test_of_many_that_find_a_stale_lock_one_takes_it_over(tmp_path: Path) -> None:
    pid, started = a_dead_process()

    def attempt(_: int):
        try:
            return take(tmp_path)
        except UsageError:
            return None

    for round_ in range(20):
        leave(tmp_path, round_ + 1, pid=pid, started=started)
        with ThreadPoolExecutor(8) as many:
            held = [lock for lock in many.map(attempt, range(8)) if lock is not None]
        assert len(held) == 1 and len(list(tmp_path.iterdir())) == 1
        held[0].release()


def test_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    def no_links(source, target) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    lock = take(tmp_path)
    with pytest.raises(UsageError):
        take(tmp_path)
    lock.release()


def test_a_run_whose_lock_was_taken_over_stops(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    lock = take(tmp_path)
    lock.check()
    leave(tmp_path, 2, host="node7", place="elsewhere")
    deadline = time.monotonic() + 10
    with pytest.raises(LoftqError, match=r"took .* over") as caught:
        while time.monotonic() < deadline:
            lock.check()
            time.sleep(0.01)
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock.2"], "the new owner's lock is left alone"


def test_the_heart_beats(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.01)
    lock = take(tmp_path)
    (path,) = tmp_path.iterdir()
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    lock.release()
    assert not path.exists() and time.monotonic() < deadline


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_at_once_after_an_end_of_any_kind(how, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"""
import os
from loftq_cli.progress import Reporter
import loftq_cli
class Stop(Reporter):
    def working(self, unit):
        if unit.matrix is not None and "layers.1" in unit.tensor:
            os.kill(os.getpid(), {int(how)})
loftq_cli.quantize({str(random_llama)!r}, output={str(out)!r}, reporter=Stop(), **{RECIPE!r})
"""
    subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    locks = list((out / ".loftq").glob("lock.*"))
    assert len(locks) == (how == signal.SIGKILL) and not (out / "config.json").exists()
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert tensors(out) and not (out / ".loftq").exists()
