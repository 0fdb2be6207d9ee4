"""Where in a model's depth its modules stand: by the numbered lists in their paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"(.*?)(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Layer:
    """An entry of a numbered list of modules: `model.layers.3.mlp.up_proj` is in layer 3 of the stack `model.layers`,
    which has `count` layers."""

    stack: str
    index: int
    count: int

    @property
    def depth(self) -> float:
        """0 for the first layer of the stack, 1 for the last."""
        return self.index / max(1, self.count - 1)


def find_layers(modules: Sequence[str]) -> list[Layer | None]:
    """The outermost layer of every module path; None outside numbered lists."""
    found = [(match[1], int(match[2])) if (match := _LAYER.match(module)) else None for module in modules]
    counts: dict[str, int] = {}
    for stack, index in filter(None, found):
        counts[stack] = max(counts.get(stack, 0), index + 1)
    return [layer and Layer(*layer, counts[layer[0]]) for layer in found]
