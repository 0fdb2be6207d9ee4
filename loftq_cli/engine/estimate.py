"""How long a plan will take here and how much memory: from a short trial of this machine, kept for the next time.

The trial converts one random matrix of every distinct shape (large ones by a smaller matrix of the same proportions,
since the work grows with the number of weights) and writes some megabytes beside the output.
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

from loftq_cli.artifacts.summary import versions
from loftq_cli.cache import cache_folder, keep, read_cached
from loftq_cli.engine.batches import MOST_BATCHED, Batch, batch_size, form_batches
from loftq_cli.engine.convert import convert, convert_together
from loftq_cli.engine.lanes import KEPT_BYTES, LANE_BYTES, MOST_LANES, Pace, lane_pool
from loftq_cli.errors import LoftqError
from loftq_cli.planner import Plan, Unit
from loftq_cli.precision import full_precision
from loftq_cli.recipe import Recipe

_TRIAL_WEIGHTS = 16_000_000  # large enough that the work is in proportion to it, small enough for a second or two
_DISK_TRIAL = 64 << 20
_WORKING_SET = 12  # bytes a weight: W and W - Q in float32, W - Q in bfloat16, codes of this and of the best step
_REFINED_SET = 10  # further bytes a weight for `refined`: target and feedback in float32, BA in bfloat16
_SPARE = 120 << 20  # allocator, thread stacks, buffers on their way to the disk

# Bytes a weight on a device, where quantizing goes through memory several times: measured 30 alone, 33 in a batch.
_DEVICE_SET = 33
_DEVICE_SPARE = 64 << 20  # what the libraries of products and decompositions take
_LEAVING = 2  # batches whose outputs are on their way to the host, at most, while the next is converted
_PAGE_LOCKED = 2  # times its size that a tensor takes in page-locked memory, at most: torch rounds to powers of two


@dataclass(frozen=True)
class Estimate:
    """Wall seconds and peak resident (on a GPU: device) bytes of `quantize` on this machine."""

    seconds: float
    peak_memory_bytes: int


@full_precision()
def estimate(plan: Plan, device: torch.device) -> Estimate:
    """Estimate a plan's cost on `device`; takes seconds the first time and nothing from then on."""
    pace = choose_pace(plan, device, None)
    peak = peak_memory(plan, device, pace)  # before the trials leave their own memory behind
    known = _Trials(device)
    seconds = sum(known.seconds(unit, plan.recipe, pace) * count for unit, count in _distinct(plan.matrices))
    copied = sum(unit.backbone_bytes for unit in plan.kept)
    seconds += (copied + plan.backbone_bytes + plan.adapter_bytes) * known.seconds_per_byte(plan.output)
    known.save()
    return Estimate(seconds, peak)


def peak_memory(plan: Plan, device: torch.device, pace: Pace) -> int:
    """Peak memory of carrying out a plan at this pace, on a GPU the device's."""
    method = plan.recipe.method
    if device.type != "cpu":
        return _device_memory(form_batches(plan.units, plan.recipe, pace.batch), pace, method)
    needs = [working_set(unit, method) for unit in plan.units]
    together = pace.lanes * max((need for need in needs if need <= LANE_BYTES), default=0)
    ahead = max((unit.source.nbytes for unit in plan.units), default=0) if pace.read_ahead else 0
    return resident_memory() + max(together, max(needs, default=0)) + ahead + _SPARE


def _device_memory(batches: Iterable[Batch], pace: Pace, method: str) -> int:
    """Of the batch that is converted, the next one's sources and the last ones' outputs. What is copied stays away."""
    units = [[unit for unit in batch.units if unit.matrix is not None] for batch in batches]
    needs = max((sum(device_set(unit, method) for unit in batch) for batch in units), default=0)
    ahead = max((sum(unit.source.nbytes for unit in batch) for batch in units), default=0) if pace.read_ahead else 0
    outputs = max((_output_bytes(batch) for batch in units), default=0)
    return needs + ahead + _LEAVING * outputs + _DEVICE_SPARE


def choose_pace(plan: Plan, device: torch.device, limit: int | None) -> Pace:
    """The fastest pace of one process within `limit` bytes of resident memory (on a GPU, of the host's).

    Raises:
        LoftqError: not even one unit at a time fits.
    """
    keeps = limit is None  # gaps are not foreseen
    paces = _paces_on_cpu(keeps) if device.type == "cpu" else _PACES_ON_DEVICE
    for pace in paces:
        if limit is None or _resident_peak(plan, device, pace) <= limit:
            return pace
    largest = max(plan.units, key=lambda unit: working_set(unit, plan.recipe.method))
    needed = _resident_peak(plan, device, paces[-1])
    raise LoftqError(
        f"--max-memory {(limit or 0) / 1e9:.2f}GB is too little: {largest.tensor} {list(largest.source.shape)} needs "
        f"about {needed / 1e9:.2f}GB; allow that, or leave it out with --exclude '{largest.module}'."
    )


_PACES_ON_DEVICE = [*(Pace(batch=size) for size in (MOST_BATCHED, MOST_BATCHED // 4, 1)), Pace(read_ahead=False)]


def _paces_on_cpu(keeps: bool) -> list[Pace]:
    """The fastest first."""
    threads = torch.get_num_threads()
    paces = [Pace(True, lanes, threads // lanes, keeps) for lanes in range(min(MOST_LANES, threads), 0, -1)]
    return [*paces, Pace(False, 1, threads)]


def _resident_peak(plan: Plan, device: torch.device, pace: Pace) -> int:
    """Peak resident memory of this process; on a GPU what passes through on its way there and back."""
    if device.type == "cpu":
        return peak_memory(plan, device, pace)
    batches = form_batches(plan.units, plan.recipe, pace.batch)
    source = max((sum(unit.source.nbytes for unit in batch.units) for batch in batches), default=0)
    outputs = max((_output_bytes(batch.units) for batch in batches), default=0)
    staged = (1 + _PAGE_LOCKED) * source * (1 + pace.read_ahead)  # as it was read, and page-locked
    return resident_memory() + staged + (1 + _LEAVING) * _PAGE_LOCKED * outputs + _SPARE


def _output_bytes(units: Iterable[Unit]) -> int:
    return sum(unit.backbone_bytes + unit.adapter_bytes for unit in units)


def working_set(unit: Unit, method: str = "loftq") -> int:
    """Bytes one unit needs at its peak: its source tensor and everything computed from it."""
    if unit.matrix is None:
        return 2 * unit.source.nbytes
    per_weight = _WORKING_SET + (_REFINED_SET if method == "refined" else 0)
    return unit.source.nbytes + per_weight * unit.matrix.weights + unit.backbone_bytes + 3 * unit.adapter_bytes


def device_set(unit: Unit, method: str = "loftq") -> int:
    """`working_set` on a GPU."""
    assert unit.matrix is not None, "what is copied never gets there"
    return working_set(unit, method) + (_DEVICE_SET - _WORKING_SET) * unit.matrix.weights


def keeps_little(unit: Unit, method: str = "loftq") -> bool:
    """Whether what a unit frees may be kept for the next one."""
    return working_set(unit, method) <= KEPT_BYTES


def fits_a_lane(unit: Unit, method: str = "loftq") -> bool:
    """Whether a unit may share the machine with others of its size."""
    return working_set(unit, method) <= LANE_BYTES


def resident_memory() -> int:
    """Resident bytes of this process now: interpreter and libraries, before any work."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 500 << 20


class _Trials:
    """Measured seconds, kept in the user's cache folder under what they depend on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
        self._machine = [name, os.cpu_count(), versions()]
        self._path = cache_folder() / "trials.json"
        self._known = {key: value for key, value in read_cached(self._path).items() if isinstance(value, float)}
        self._new = False

    def seconds(self, unit: Unit, recipe: Recipe, pace: Pace) -> float:
        """Converting one matrix; of those that share the machine, its share of the time."""
        assert unit.matrix is not None
        pace = pace if fits_a_lane(unit, recipe.method) else Pace(threads=torch.get_num_threads())
        trial = _trial_shape(*unit.matrix.shape, math.lcm(64, recipe.pooling))
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
            pace.lanes,
            pace.threads,
        ]
        together = batch_size(unit, recipe, pace.batch)
        work += [together] if together > 1 else []
        measured = self._once(work, lambda: self._convert(unit, recipe, trial, pace, together))
        return measured * unit.matrix.weights / (trial[0] * trial[1])

    def seconds_per_byte(self, output: Path) -> float:
        """Writing, flushing and hashing one byte."""
        folder = next(parent for parent in output.parents if parent.is_dir())
        return self._once(["disk", os.stat(folder).st_dev], lambda: _write_trial(folder)) / _DISK_TRIAL

    def save(self) -> None:
        """Keep what was measured."""
        if self._new:
            keep(self._path, self._known)

    def _once(self, work: list, measure) -> float:
        key = hashlib.sha256(json.dumps([self._machine, work], default=str).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key], self._new = measure(), True
        return self._known[key]

    def _convert(self, unit: Unit, recipe: Recipe, shape: tuple[int, int], pace: Pace, together: int) -> float:
        assert unit.matrix is not None
        matrix = replace(unit.matrix, out_features=shape[0], in_features=shape[1], heads=0)
        target = unit.target and replace(unit.target, out_features=shape[0], in_features=shape[1])
        stored = shape[::-1] if matrix.transposed else shape
        trial = replace(unit, source=replace(unit.source, shape=stored), matrix=matrix, target=target)
        weight = torch.randn(stored, generator=torch.Generator().manual_seed(0)).to(unit.source.dtype)

        def work() -> None:
            if together > 1:
                convert_together([trial] * together, [weight] * together, recipe, self._device)
            else:
                convert(trial, weight, recipe, self._device)

        best = float("inf")
        with lane_pool(pace) as pool:
            for _ in range(3):  # the first run may compile kernels
                started = time.perf_counter()
                runs = [pool.submit(work) for _ in range(pace.lanes)]
                wait(runs)
                best = min(best, time.perf_counter() - started)
        for run in runs:
            run.result()
        return best / (pace.lanes * together)


def _distinct(units: Iterable[Unit]) -> list[tuple[Unit, int]]:
    """One unit of every kind of work, and how often it comes."""
    counts: Counter[tuple] = Counter()
    first: dict[tuple, Unit] = {}
    for unit in units:
        assert unit.matrix is not None
        key = (unit.matrix.shape, unit.matrix.grid, unit.target and unit.target.rank, unit.kind)
        counts[key] += 1
        first.setdefault(key, unit)
    return [(first[key], count) for key, count in counts.items()]


def _trial_shape(n_out: int, n_in: int, multiple: int = 64) -> tuple[int, int]:
    """The matrix itself, or one of the same proportions with about `_TRIAL_WEIGHTS` weights in multiples."""
    shrink = (n_out * n_in / _TRIAL_WEIGHTS) ** 0.5
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
        return 0.2  # nothing may be written there now: an ordinary disk
