"""Estimate the time and memory of a plan from a short trial on this machine, whose results are cached.

The trial converts one random matrix of every distinct shape (for large ones a smaller matrix of the same proportions,
since the work is proportional to the number of weights) and writes some megabytes next to the output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loftq_cli.engine.compute.convert import convert, convert_together
from loftq_cli.engine.compute.lanes import Schedule, lane_pool
from loftq_cli.engine.compute.stacks import stack_size
from loftq_cli.engine.cost.memory import fits_a_lane, peak_memory
from loftq_cli.engine.cost.schedule import choose_schedule
from loftq_cli.machine.cache import cache_folder, keep, read_cached
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.usage import versions
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import UNWEIGHTED, Unit
from loftq_cli.recipe.model import Recipe

_TRIAL_WEIGHTS = 16_000_000  # large enough for the time to be proportional to it, small enough for a second or two
_SLOW_TRIAL_WEIGHTS = 500_000  # of a trellis, which takes about 100 times as long
_DISK_TRIAL = 64 << 20


@dataclass(frozen=True)
class Estimate:
    """Wall seconds and peak resident (on a GPU: device) bytes of `quantize` on this machine."""

    seconds: float
    peak_memory_bytes: int


@full_precision()
def estimate(plan: Plan, device: torch.device) -> Estimate:
    """Estimate a plan's cost on `device`; takes seconds the first time and almost no time after that."""
    schedule = choose_schedule(plan, device, None)
    peak = peak_memory(plan, device, schedule)  # before the trials add their own memory
    known = _Trials(device)
    seconds = sum(known.seconds(unit, plan.recipe, schedule) * count for unit, count in _distinct(plan.matrices))
    copied = sum(unit.backbone_bytes for unit in plan.kept)
    seconds += (copied + plan.backbone_bytes + plan.adapter_bytes) * known.seconds_per_byte(plan.output)
    known.save()
    return Estimate(seconds, peak)


class _Trials:
    """Measured seconds, cached in the user's cache folder by a hash of everything they depend on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
        self._machine = [name, os.cpu_count(), versions()]
        self._path = cache_folder() / "trials.json"
        self._known = read_cached(self._path, float)
        self._new = False

    def seconds(self, unit: Unit, recipe: Recipe, schedule: Schedule) -> float:
        """Return the seconds to convert one matrix; if several share the machine, the share of one."""
        assert unit.matrix is not None
        schedule = schedule if fits_a_lane(unit, recipe.method) else Schedule(threads=torch.get_num_threads())
        slow = isinstance(unit.matrix.grid, TrellisGrid)
        most = _SLOW_TRIAL_WEIGHTS if slow else _TRIAL_WEIGHTS
        trial = _trial_shape(*unit.matrix.shape, math.lcm(64, recipe.pooling), most)
        rank = unit.target.rank if unit.target else 0
        work = [
            recipe.method,
            recipe.iters,
            recipe.init,
            recipe.svd,
            recipe.format,
            rank,
            str(unit.matrix.grid),
            trial,
            unit.kind,
            schedule.lanes,
            schedule.threads,
        ]
        together = stack_size(unit, recipe, schedule.stack)
        work += [together] if together > 1 else []
        measured = self._once(work, lambda: self._convert(unit, recipe, trial, schedule, together))
        return measured * unit.matrix.weights / (trial[0] * trial[1])

    def seconds_per_byte(self, output: Path) -> float:
        """Return the seconds to write, flush and hash one byte."""
        folder = next(parent for parent in output.parents if parent.is_dir())
        return self._once(["disk", os.stat(folder).st_dev], lambda: _write_trial(folder)) / _DISK_TRIAL

    def save(self) -> None:
        """Save new measurements."""
        if self._new:
            keep(self._path, self._known)

    def _once(self, work: list, measure) -> float:
        key = hashlib.sha256(json.dumps([self._machine, work], default=str).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key], self._new = measure(), True
        return self._known[key]

    def _convert(self, unit: Unit, recipe: Recipe, shape: tuple[int, int], schedule: Schedule, together: int) -> float:
        assert unit.matrix is not None
        matrix = replace(unit.matrix, out_features=shape[0], in_features=shape[1], heads=0)
        target = unit.target and replace(unit.target, out_features=shape[0], in_features=shape[1])
        stored = matrix.orientation.turn_shape(shape)
        trial = replace(unit, source=replace(unit.source, shape=stored), matrix=matrix, target=target)
        weight = torch.randn(stored, generator=torch.Generator().manual_seed(0)).to(unit.source.dtype)
        moment = torch.eye(shape[1]) if recipe.method == "ldlq" and unit.kind not in UNWEIGHTED else None

        def work() -> None:
            if together > 1:
                convert_together([trial] * together, [weight] * together, recipe, self._device)
            else:
                convert(trial, weight, recipe, self._device, moment)

        best = float("inf")
        with lane_pool(schedule) as pool:
            for _ in range(3):  # the first run may compile kernels
                started = time.perf_counter()
                runs = [pool.submit(work) for _ in range(schedule.lanes)]
                wait(runs)
                best = min(best, time.perf_counter() - started)
        for run in runs:
            run.result()
        return best / (schedule.lanes * together)


def _distinct(units: Iterable[Unit]) -> list[tuple[Unit, int]]:
    """Return one unit of every kind of work, and the number of such units."""
    counts: Counter[tuple] = Counter()
    first: dict[tuple, Unit] = {}
    for unit in units:
        assert unit.matrix is not None
        key = (unit.matrix.shape, unit.matrix.grid, unit.target and unit.target.rank, unit.kind)
        counts[key] += 1
        first.setdefault(key, unit)
    return [(first[key], count) for key, count in counts.items()]


def _trial_shape(n_out: int, n_in: int, multiple: int = 64, most: int = _TRIAL_WEIGHTS) -> tuple[int, int]:
    """Return the shape itself, or a smaller one of the same proportions, about `most` weights in multiples."""
    shrink = (n_out * n_in / most) ** 0.5
    if shrink <= 1:
        return n_out, n_in
    n_out, n_in = (max(1, round(size / shrink / multiple)) * multiple for size in (n_out, n_in))
    return n_out, n_in


def _write_trial(folder: Path) -> float:
    content = os.urandom(_DISK_TRIAL)
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            started = time.perf_counter()
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
            hashlib.sha256(content)
            return time.perf_counter() - started
    except OSError:
        return 0.2  # the folder is not writable: assume an ordinary disk
