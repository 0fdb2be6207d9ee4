"""A fixed number of seeded cases of `fuzz.py`; more by hand: python tests/fuzz.py --cases 2000 --seed N."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fuzz_pickles import CALLS, call
from support.fuzzing.case import MARK, Case
from support.fuzzing.judge import judge, snapshot
from support.fuzzing.odd_values import SECRETS
from support.fuzzing.runner import KINDS, Fuzzer
from support.fuzzing.table import Table
from support.fuzzing.watch import Clock, Hang, Memory, Watch, deadline
from support.hub_server import HubServer, talking_to

CASES = 300
COMMANDS = {
    "quantize", "plan", "merge", "inspect", "verify", "verify --source", "eval", "push --dry-run", "batch",
    "batch --dry-run", "worker",
}  # fmt: skip


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub, talking_to(hub, folder / "home", patch):
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield Fuzzer(folder / "fuzz", 7, hub)


def test_nothing_bad_gets_through(fuzzer: Fuzzer) -> None:
    """0 tracebacks, 0 hangs, 0 executions, 0 half outputs."""
    outcomes = [fuzzer.run(number) for number in range(CASES)]
    assert [f"case {o.number} ({o.kind}): {finding}" for o in outcomes for finding in o.findings] == []
    kinds = {outcome.kind.removesuffix(" streamed") for outcome in outcomes}
    assert kinds == set(KINDS) and {outcome.code for outcome in outcomes} >= {0, 1, 2, 3, 4}
    assert {outcome.command for outcome in outcomes} == COMMANDS
    assert any(outcome.kind.endswith(" streamed") for outcome in outcomes)


def test_a_case_is_the_same_every_time(fuzzer: Fuzzer) -> None:
    for number in (3, 8, 40):
        one, other = fuzzer.run(number), fuzzer.run(number)
        assert (one.kind, one.code, one.said) == (other.kind, other.code, other.said)


def test_the_fuzzer_sees_what_is_bad(tmp_path: Path) -> None:
    """Its judgement is no formality: calls, writes, tracebacks, half outputs and chatter are findings."""
    case = Case(tmp_path, random.Random(0))
    with Watch.get().watching(tmp_path / "out") as seen:
        os.system("true")
        (tmp_path / "elsewhere.txt").write_bytes(b"x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "allowed.txt").write_bytes(b"x")
    assert len(seen) == 2 and "os.system" in seen[0] and "elsewhere.txt" in seen[1]
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with Watch.get().watching(tmp_path / "out") as seen:
        (tmp_path / "outside.txt").write_bytes(b"x")
        (tmp_path / "out" / "link" / "elsewhere.txt").unlink()
        os.rename(tmp_path / "outside.txt", tmp_path / "out" / "inside.txt")
        (tmp_path / "out" / "inside.txt").unlink()
    assert [event.split()[0] for event in seen] == ["writes", "os.remove", "os.rename"]
    (tmp_path / "out" / "link").unlink()
    assert judge(case, 1, "loftq: a sentence.\n", "") == ["left behind ['allowed.txt']"]
    (tmp_path / "out" / "allowed.txt").unlink()
    assert judge(case, 1, "loftq: a sentence.\n", "") == []
    assert judge(case, 0, "", "")[0].startswith("an output that cannot be read")
    for code, stderr in (
        (3, "loftq: a.\n"),
        (1, ""),
        (1, "loftq: a\n"),
        (1, "loftq: a.\nloftq: b.\n"),
        (1, "loftq: unexpected KeyError: 1.\n"),
        (1, "loftq: a \x1b[31m name.\n"),
        (1, f"loftq: {SECRETS[0]}.\n"),
    ):
        assert len(judge(case, code, stderr, "")) == 1
    (tmp_path / MARK).write_bytes(b"")
    assert judge(case, 1, "loftq: a sentence.\n", "") == ["EXECUTED"]


def test_the_fuzzer_sees_files_that_change_and_memory_that_grows(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_bytes(b"1")
    os.mkfifo(tmp_path / "pipe")
    before = snapshot(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert snapshot(tmp_path, tmp_path / "out") == before
    (tmp_path / "a" / "x.txt").write_bytes(b"2")
    assert snapshot(tmp_path, tmp_path / "out") != before
    memory = Memory()
    content = b"x" * 50_000_000
    del content
    assert 40e6 < memory.growth() < 200e6


def test_the_fuzzer_sees_what_takes_too_long() -> None:
    clock = Clock()
    with pytest.raises(Hang), deadline(1):
        time.sleep(60)
    assert 1 <= clock.seconds() <= clock.wall() < 30


def test_verify_must_see_what_differs_and_a_resumed_run_must_not_differ(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    sound.mkdir()
    (sound / "a.json").write_bytes(b"{}")
    case = Case(tmp_path, random.Random(0), command="verify", sound=sound)
    case.source.mkdir()
    (case.source / "a.json").write_bytes(b"[]")
    assert judge(case, 0, "", "") == ["a.json differs, and verify did not see it"]
    (case.source / "a.json").write_bytes(b"{}")
    assert judge(case, 0, "", "") == []
    case = Case(tmp_path, random.Random(0), command="merge", reference={"model.safetensors": "0"})
    assert "model.safetensors differ from an undisturbed run's" in judge(case, 0, "", "")


def test_the_table_counts_cases_by_command_and_damage(fuzzer: Fuzzer) -> None:
    table, outcomes = Table(7), [fuzzer.run(number) for number in range(3)]
    for outcome in outcomes:
        table.add(outcome)
    content = table.as_dict(1.0)
    assert content["cases"] == 3 and content["findings"] == 0
    assert {(row["command"], sum(row["exit_codes"].values())) for row in content["rows"]} == {
        (outcome.command, 1) for outcome in outcomes
    }


def test_hostile_pickles_would_do_harm(tmp_path: Path) -> None:
    """What the fuzzer puts into files is what Python's own unpickler would run."""
    import pickle

    mark, rng = tmp_path / MARK, random.Random(0)
    assert len(CALLS) >= 25
    for _ in range(200):
        try:
            pickle.loads(b"\x80\x02" + call(_Only(rng), mark) + b".")
        except Exception:
            continue
        if mark.exists():
            return
    pytest.fail("no call was made")


class _Only(random.Random):
    """Chooses calls that touch the mark."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng.random())

    def choice(self, values):  # type: ignore[override]
        return super().choice([value for value in values if value[:2] == ("builtins", "exec")] or values)
