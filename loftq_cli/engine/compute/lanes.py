"""Convert several matrices at a time on one CPU: small ones finish sooner on a thread or two each than one after the
other on all threads, because apart from matrix products, the work (above all LAPACK) hardly benefits from threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

MOST_LANES = 4
LANE_BYTES = 512 << 20  # largest working set of a unit that shares the machine; larger ones use all threads
KEPT_BYTES = 256 << 20  # largest working set whose freed memory is kept; beyond it fragmentation costs more


@dataclass(frozen=True)
class Schedule:
    """The number of units that are converted at a time, and the resources they may use.

    Attributes:
        read_ahead: read the next tensor while others are converted.
        lanes: units converted at the same time; those above LANE_BYTES are always converted alone.
        threads: torch's threads in each lane.
        keeps_memory: keep memory freed by units of up to KEPT_BYTES for the next ones.
        stack: maximum number of small matrices of equal shape that are converted at once (`engine.compute.stacks`).
    """

    read_ahead: bool = True
    lanes: int = 1
    threads: int = 1
    keeps_memory: bool = False
    stack: int = 1


def lane_pool(schedule: Schedule) -> ThreadPoolExecutor:
    """Return an executor with one thread per lane, each with its share of torch's threads."""
    return ThreadPoolExecutor(
        schedule.lanes, "loftq-lane", initializer=torch.set_num_threads, initargs=(schedule.threads,)
    )


def in_lanes(schedule: Schedule, items: Iterator[T], work: Callable[[T], None]) -> None:
    """Call `work` with every item, `schedule.lanes` of them at a time.

    Lanes take items in order, one lane at a time. After a lane has failed or the caller was interrupted, no lane takes
    another item.

    Raises:
        Exception: from the first call that failed, after the other lanes have finished their items.
    """
    if schedule.lanes == 1:
        for item in items:
            work(item)
        return
    drawing, stopped = threading.Lock(), threading.Event()

    def lane() -> None:
        try:
            while (item := _draw(items, drawing, stopped)) is not None:
                work(item)
        except BaseException:
            stopped.set()
            raise

    with lane_pool(schedule) as pool:
        lanes = [pool.submit(lane) for _ in range(schedule.lanes)]
        try:
            wait(lanes, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
    for done in lanes:
        done.result()


def _draw(items: Iterator[T], drawing: threading.Lock, stopped: threading.Event) -> T | None:
    with drawing:
        return None if stopped.is_set() else next(items, None)
