"""Choose the fastest schedule that fits the memory."""

from __future__ import annotations

import torch

from loftq_cli.engine.compute.lanes import MOST_LANES, Schedule
from loftq_cli.engine.compute.stacks import MOST_STACKED
from loftq_cli.engine.cost.memory import resident_peak, working_set
from loftq_cli.errors import LoftqError
from loftq_cli.machine.sizes import size_text
from loftq_cli.planning.plan import Plan


def choose_schedule(plan: Plan, device: torch.device, limit: int | None) -> Schedule:
    """Return the fastest schedule of one process within `limit` bytes of resident memory (on the host).

    Raises:
        LoftqError: not even one unit at a time fits.
    """
    keeps = limit is None  # the prediction does not cover fragmentation
    schedules = _schedules_on_cpu(keeps) if device.type == "cpu" else _SCHEDULES_ON_DEVICE
    for schedule in schedules:
        if limit is None or resident_peak(plan, device, schedule) <= limit:
            return schedule
    largest = max(plan.units, key=lambda unit: working_set(unit, plan.recipe.method))
    needed = resident_peak(plan, device, schedules[-1])
    raise LoftqError(
        f"--max-memory {size_text(limit or 0)} is too little: {largest.tensor} {list(largest.source.shape)} needs "
        f"about {size_text(needed)}; allow that, or leave it out with --exclude '{largest.module}'."
    )


_SCHEDULES_ON_DEVICE = [
    *(Schedule(stack=size) for size in (MOST_STACKED, MOST_STACKED // 4, 1)),
    Schedule(read_ahead=False),
]


def _schedules_on_cpu(keeps: bool) -> list[Schedule]:
    """Return all schedules, fastest first."""
    threads = torch.get_num_threads()
    schedules = [Schedule(True, lanes, threads // lanes, keeps) for lanes in range(min(MOST_LANES, threads), 0, -1)]
    return [*schedules, Schedule(False, 1, threads)]
