"""The least time a conversion can take on this machine: matrix products and disk traffic at measured rates.

Products are counted by watching torch while one matrix of every distinct shape is converted, so nothing is estimated.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loftq_cli.engine.compute.convert import convert
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit

_PRODUCTS = {"aten.mm.default", "aten.mm.out", "aten.addmm.default", "aten.addmm.out", "aten.bmm.default"}
_PROBE_BYTES = 1 << 30


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in large square products, and bytes a second of the disk (uncached)."""

    float32: float
    bfloat16: float
    read: float
    write: float
    threads: int


class _Counter(TorchDispatchMode):
    """Counts the operations of every matrix product by the dtype of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in _PRODUCTS:
            first, second = args[-2:] if "addmm" in str(func) else args[:2]
            self.operations[first.dtype] += 2 * first.numel() * second.shape[-1]
        return func(*args, **(kwargs or {}))


def measure_rates(folder: Path, threads: int) -> Rates:
    """Best of several runs for products; a gigabyte written, flushed, dropped from the cache and read for the disk."""
    torch.set_num_threads(threads)
    return Rates(_product_rate(torch.float32), _product_rate(torch.bfloat16), *_disk_rates(folder), threads)


def count_products(plan: Plan) -> Counter[torch.dtype]:
    """Operations of all matrix products of a plan, by dtype. float64 ones count as float32 at half the rate."""
    total: Counter[torch.dtype] = Counter()
    torch.set_num_threads(1)  # the counter only sees its own thread
    shapes: dict[tuple[int, ...], list[Unit]] = {}
    for unit in plan.matrices:
        shapes.setdefault(unit.source.shape, []).append(unit)
    for units in shapes.values():
        weight = torch.randn(units[0].source.shape).to(units[0].source.dtype)
        with _counting() as counter:
            convert(units[0], weight, plan.recipe, torch.device("cpu"))
        for dtype, operations in counter.operations.items():
            total[dtype] += operations * len(units)
    return total


def floor_seconds(plan: Plan, operations: Counter[torch.dtype], rates: Rates) -> dict[str, float]:
    """Seconds of products, reading and writing that no conversion of this plan on this machine can avoid."""
    written = plan.backbone_bytes + plan.adapter_bytes
    return {
        "products": operations[torch.bfloat16] / rates.bfloat16
        + (operations[torch.float32] + 2 * operations[torch.float64]) / rates.float32,
        "reading": plan.source_bytes / rates.read,
        "writing": written / rates.write,
    }


@contextmanager
def _counting() -> Iterator[_Counter]:
    with _Counter() as counter:
        yield counter


def _product_rate(dtype: torch.dtype, size: int = 4096) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _disk_rates(folder: Path) -> tuple[float, float]:
    """(read, write) in bytes a second."""
    block = os.urandom(1 << 24)
    with tempfile.NamedTemporaryFile(dir=folder) as handle:
        started = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
        write = _PROBE_BYTES / (time.perf_counter() - started)
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with open(handle.name, "rb", buffering=0) as reader:
            while reader.read(len(block)):
                pass
        return _PROBE_BYTES / (time.perf_counter() - started), write
