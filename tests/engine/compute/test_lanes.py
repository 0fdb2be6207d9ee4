"""Several matrices at a time: all are converted, never more at once than lanes, and a failure ends them cleanly."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.engine.compute.lanes import KEPT_BYTES, LANE_BYTES, Schedule, in_lanes
from loftq_cli.engine.compute.stacks import Stack
from loftq_cli.engine.run import by_size
from loftq_cli.errors import LoftqError

SCHEDULE = Schedule(read_ahead=True, lanes=3, threads=2, keeps_memory=True)


def test_every_item_is_done_and_no_more_at_once_than_lanes() -> None:
    outside, running, most, done, threads = torch.get_num_threads(), 0, 0, [], set()
    counting, together = threading.Lock(), threading.Barrier(3)

    def work(item: int) -> None:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        threads.add(torch.get_num_threads())
        if item < 3:
            together.wait(60)
        time.sleep(0.01)
        with counting:
            running -= 1
            done.append(item)

    in_lanes(SCHEDULE, iter(range(20)), work)
    assert sorted(done) == list(range(20)) and most == 3
    assert threads == {2} and torch.get_num_threads() == outside


@pytest.mark.parametrize("where", ["work", "items"])
def test_a_failure_stops_all_lanes_and_is_raised(where: str) -> None:
    drawn = []

    def items():
        for i in range(1000):
            drawn.append(i)
            if where == "items" and i == 5:
                raise LoftqError("the sixth")
            yield i

    def work(item: int) -> None:
        if where == "work" and item == 5:
            raise LoftqError("the sixth")
        time.sleep(0.002)

    with pytest.raises(LoftqError, match="the sixth"):
        in_lanes(SCHEDULE, items(), work)
    assert len(drawn) < 500


def test_an_interrupt_lets_lanes_finish_what_they_are_at() -> None:
    begun, ended = [], []

    def work(item: int) -> None:
        begun.append(item)
        if item == 4:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)
        ended.append(item)

    with pytest.raises(KeyboardInterrupt):
        in_lanes(SCHEDULE, iter(range(10_000)), work)
    assert sorted(begun) == sorted(ended) and len(begun) < 5_000


def test_a_damaged_matrix_ends_the_run_by_its_name(random_llama: Path, tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in random_llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("loftq_cli.engine.run.choose_schedule", lambda *_: SCHEDULE)
    with pytest.raises(LoftqError, match=f"{name} in model.safetensors holds"):
        loftq_cli.quantize(source, output=tmp_path / "out", bits=2, rank=4)
    assert not (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / ".loftq" / "journal").exists()


def test_large_matrices_are_converted_alone_and_middling_ones_keep_no_memory(
    random_llama: Path, tmp_path: Path, monkeypatch
) -> None:
    from loftq_cli.engine.compute.pipeline import Run
    from loftq_cli.engine.cost import memory

    plan = loftq_cli.plan(random_llama, output=tmp_path / "out", bits=2)
    *_, middle, largest = sorted(plan.units, key=lambda unit: unit.source.nbytes)
    sizes = {middle.tensor: LANE_BYTES, largest.tensor: LANE_BYTES + 1}
    monkeypatch.setattr(memory, "working_set", lambda unit, _: sizes.get(unit.tensor, KEPT_BYTES))
    run = Run(plan, None, torch.device("cpu"), None, SCHEDULE)  # type: ignore[arg-type]
    (kept, small), (fresh, middling), (alone, large) = by_size(run, [Stack.of(unit) for unit in plan.units])
    assert (kept.lanes, fresh.lanes, alone.lanes) == (3, 3, 1)
    assert kept.keeps_memory and not fresh.keeps_memory and not alone.keeps_memory
    assert middling == [Stack.of(middle)] and large == [Stack.of(largest)] and len(small) + 2 == len(plan.units)
