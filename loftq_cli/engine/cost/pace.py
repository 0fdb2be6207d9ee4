"""How much to do at once: the fastest schedule that fits the memory."""

from __future__ import annotations

import torch

from loftq_cli.engine.compute.lanes import MOST_LANES, Pace
from loftq_cli.engine.compute.stacks import MOST_BATCHED
from loftq_cli.engine.cost.memory import resident_peak, working_set
from loftq_cli.errors import LoftqError
from loftq_cli.planning.plan import Plan


def choose_pace(plan: Plan, device: torch.device, limit: int | None) -> Pace:
    """The fastest pace of one process within `limit` bytes of resident memory (on a GPU, of the host's).

    Raises:
        LoftqError: not even one unit at a time fits.
    """
    keeps = limit is None  # gaps are not foreseen
    paces = _paces_on_cpu(keeps) if device.type == "cpu" else _PACES_ON_DEVICE
    for pace in paces:
        if limit is None or resident_peak(plan, device, pace) <= limit:
            return pace
    largest = max(plan.units, key=lambda unit: working_set(unit, plan.recipe.method))
    needed = resident_peak(plan, device, paces[-1])
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
