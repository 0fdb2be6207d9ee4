"""The cost model: cached trials, proportional work, memory limits enforced before work starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.engine.compute.lanes import Schedule
from loftq_cli.engine.cost import estimate as module
from loftq_cli.engine.cost.estimate import estimate
from loftq_cli.engine.cost.memory import peak_memory
from loftq_cli.engine.cost.schedule import choose_schedule
from loftq_cli.errors import LoftqError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loftq" / "trials.json"


def test_trials_are_remembered(random_llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = loftq_cli.plan(random_llama, bits=2, rank=4)
    first = estimate(plan, CPU)
    assert first.seconds > 0 and own_cache.exists()
    monkeypatch.setattr(module, "convert", lambda *_: pytest.fail("a remembered trial was repeated"))
    assert estimate(plan, CPU).seconds == first.seconds


def test_a_broken_or_unwritable_cache_only_costs_time(random_llama: Path, own_cache: Path) -> None:
    plan = loftq_cli.plan(random_llama, bits=2, rank=4)
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("[not a cache")
    assert estimate(plan, CPU).seconds > 0
    own_cache.unlink()
    own_cache.mkdir()
    assert estimate(plan, CPU).seconds > 0


def test_large_matrices_are_tried_at_a_smaller_size() -> None:
    out_features, in_features = module._trial_shape(13824, 5120)
    assert out_features * in_features < 1.1 * module._TRIAL_WEIGHTS
    assert out_features / in_features == pytest.approx(13824 / 5120, rel=0.05)
    assert module._trial_shape(64, 160) == (64, 160)


def test_memory_limit_gives_up_lanes_then_reading_ahead_and_then_refuses(random_llama: Path, tmp_path: Path) -> None:
    plan = loftq_cli.plan(random_llama, bits=2, output=tmp_path / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        schedules = [Schedule(True, 2, 1, True), Schedule(True, 1, 2, True), Schedule(False, 1, 2)]
        peaks = [peak_memory(plan, CPU, schedule) for schedule in schedules]
        assert peaks == sorted(set(peaks), reverse=True)
        assert choose_schedule(plan, CPU, None) == schedules[0]
        assert choose_schedule(plan, CPU, 10**12) == Schedule(True, 2, 1)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(LoftqError, match=r"--max-memory 1 MB is too little: model\.layers"):
        loftq_cli.quantize(random_llama, output=tmp_path / "out", max_memory="1MB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("schedule", [Schedule(False), Schedule(True, 3, 1)], ids=["one tensor at a time", "lanes"])
def test_every_schedule_gives_the_same_bytes(
    random_llama: Path, tmp_path: Path, monkeypatch, schedule: Schedule
) -> None:
    loftq_cli.quantize(random_llama, output=tmp_path / "a", bits=2)
    monkeypatch.setattr("loftq_cli.engine.run.choose_schedule", lambda *_: schedule)
    loftq_cli.quantize(random_llama, output=tmp_path / "b", bits=2)
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_peak_is_not_that_of_the_process_it_was_started_from() -> None:
    """getrusage inherits the peak of the parent, such as a notebook that holds a model."""
    ballast = bytearray(b"x") * (1 << 30)
    program = "from loftq_cli.machine.usage import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 50 << 20 < int(done.stdout) < len(ballast)
