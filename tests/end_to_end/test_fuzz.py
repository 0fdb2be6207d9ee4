"""A fixed number of seeded cases of `fuzz.py`; more by hand: python tests/fuzz.py --cases 2000 --seed N."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz import KINDS, MARK, Case, Fuzzer, Watch, judge
from support.fuzz_pickles import CALLS, call
from support.hub_server import HubServer

CASES = 300


@pytest.fixture
def fuzzer(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fuzzer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Fuzzer(tmp_path / "fuzz", 7, hub)


def test_nothing_bad_gets_through(fuzzer: Fuzzer) -> None:
    """0 tracebacks, 0 hangs, 0 executions, 0 half outputs."""
    outcomes = [fuzzer.run(number) for number in range(CASES)]
    assert [f"case {o.number} ({o.kind}): {finding}" for o in outcomes for finding in o.findings] == []
    kinds = {outcome.kind.removesuffix(" streamed") for outcome in outcomes}
    assert kinds == set(KINDS) and {outcome.code for outcome in outcomes} >= {0, 1, 2}
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
    assert judge(case, 1, "loftq: a sentence.\n", "") == ["left behind ['allowed.txt']"]
    (tmp_path / "out" / "allowed.txt").unlink()
    assert judge(case, 1, "loftq: a sentence.\n", "") == []
    assert judge(case, 0, "", "")[0].startswith("an output that cannot be read")
    for code, stderr in (
        (3, "loftq: a\n"),
        (1, ""),
        (1, "loftq: a\nloftq: b\n"),
        (1, "loftq: unexpected KeyError: 1\n"),
    ):
        assert len(judge(case, code, stderr, "")) == 1
    (tmp_path / MARK).write_bytes(b"")
    assert judge(case, 1, "loftq: a sentence.\n", "") == ["EXECUTED"]


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
