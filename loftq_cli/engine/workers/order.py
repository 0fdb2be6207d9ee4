"""What the main process tells a worker to do."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.recipe.model import Recipe

if TYPE_CHECKING:
    import torch

    from loftq_cli.engine.workers.launcher import World
if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Order:
    """What the main process tells a worker of its own, in one line of JSON."""

    recipe: dict[str, Any]
    output: str
    stream: bool
    rank: int
    device: str
    threads: int | None
    max_memory: int | None
    run_id: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def make_orders(
    recipe: Recipe,
    output: Path,
    devices: tuple[torch.device, ...],
    stream: bool,
    max_memory: int | None,
    world: World | None,
) -> list[Order]:
    """What this machine's workers are to do: all of them, or the one that is this rank of a launcher's world."""
    import torch


    ranks = range(len(devices)) if world is None else [world.rank]
    count = len(ranks)
    return [
        Order(
            recipe=recipe.as_dict(),
            output=str(output),
            stream=stream,
            rank=rank,
            device=str(devices[i if world is None else world.local_rank % len(devices)]),
            threads=max(1, torch.get_num_threads() // count),
            max_memory=None if max_memory is None else max_memory // count,
        )
        for i, rank in enumerate(ranks)
    ]
