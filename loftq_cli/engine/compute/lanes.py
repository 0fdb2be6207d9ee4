"""Several matrices at a time on one CPU: small ones on a thread or two each are done sooner than one after the other on
all of them, because what surrounds the products, LAPACK first of all, hardly gains from threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

MOST_LANES = 4
LANE_BYTES = 512 << 20  # working set up to which a unit shares the machine; larger ones keep all threads busy alone
KEPT_BYTES = 256 << 20  # up to which freed memory is kept; the gaps that larger ones leave cost more than fresh pages


@dataclass(frozen=True)
class Pace:
    """How the units of a run are worked off.

    Attributes:
        read_ahead: the next tensor is read while others are converted.
        lanes: units converted at the same time; those above LANE_BYTES are alone all the same.
        threads: torch's threads in each lane.
        keeps_memory: memory that units up to KEPT_BYTES free is kept for the next ones.
        batch: matrices converted at once at most, where they are small and equal (`engine.batches`).
    """

    read_ahead: bool = True
    lanes: int = 1
    threads: int = 1
    keeps_memory: bool = False
    batch: int = 1


def lane_pool(pace: Pace) -> ThreadPoolExecutor:
    """One thread a lane, each with its share of torch's threads."""
    return ThreadPoolExecutor(pace.lanes, "loftq-lane", initializer=torch.set_num_threads, initargs=(pace.threads,))


def in_lanes(pace: Pace, items: Iterator[T], work: Callable[[T], None]) -> None:
    """Do `work` on every item, `pace.lanes` of them at a time.

    Items are drawn by one lane at a time, in order. Once a lane has failed, or the caller is interrupted, no lane takes
    up another item.

    Raises:
        Exception: what the first failing call raised, once the other lanes have finished their item.
    """
    if pace.lanes == 1:
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

    with lane_pool(pace) as pool:
        lanes = [pool.submit(lane) for _ in range(pace.lanes)]
        try:
            wait(lanes, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
    for done in lanes:
        done.result()


def _draw(items: Iterator[T], drawing: threading.Lock, stopped: threading.Event) -> T | None:
    with drawing:
        return None if stopped.is_set() else next(items, None)
