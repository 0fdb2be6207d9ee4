"""The order that the main process gives each of its workers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LoftqError
from loftq_cli.machine.json_record import Count, InvalidRecord, Size, json_record, read_json
from loftq_cli.recipe.model import Recipe

if TYPE_CHECKING:
    import torch

    from loftq_cli.engine.workers.launcher import World


@json_record
@dataclass(frozen=True)
class Order:
    """The work of one worker, which it reads from standard input as one line of JSON.

    Attributes:
        rank: number of the worker in the run.
        threads: that torch may use; None leaves torch's own default.
        max_memory: resident bytes to stay below, None for no limit.
    """

    recipe: dict[str, Any]
    output: str
    stream: bool
    rank: Count
    device: str
    threads: Size | None
    max_memory: Count | None
    run_id: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Order:
        """
        Raises:
            LoftqError: the text is not an order.
        """
        try:
            return read_json(Order, text)
        except InvalidRecord as error:
            raise LoftqError(
                f"the order on standard input is damaged ({error}): start workers with `loftq quantize "
                "--num-processes`."
            ) from error


def make_orders(
    recipe: Recipe,
    output: Path,
    devices: tuple[torch.device, ...],
    stream: bool,
    max_memory: int | None,
    world: World | None,
) -> list[Order]:
    """Return the orders for all workers of this machine, or for the one that is this rank of a launcher's world."""
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
