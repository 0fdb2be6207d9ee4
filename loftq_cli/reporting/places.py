"""Find the layer and the place within it that a module's name stands for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a module is: `model.layers.3.mlp.up_proj` is layer 3 of the stack `model.layers`, at `mlp.up_proj`.

    Attributes:
        stack: the name before the number; "" for a module outside of all stacks.
        layer: the number; None outside of all stacks.
        module: the name after the number, with the numbers of experts as `*`.
    """

    stack: str
    layer: int | None
    module: str


def find_places(names: Iterable[str]) -> Mapping[str, Place]:
    """Return the place of every module.

    A name may have several numbers. The layer is the one with the most values among the names that differ in their
    numbers only: in `encoder.block.7.layer.1.wi` it is the block. Numbers of experts do not count.
    """
    templates: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in dict.fromkeys(names):
        parts = _pooled(name.split("."))
        templates[tuple("#" if _is_number(part) else part for part in parts)].append([name, *parts])
    places = {}
    for template, members in templates.items():
        numbered = [index for index, part in enumerate(template) if part == "#"]
        counts = {index: len({parts[index + 1] for parts in members}) for index in numbered}
        layer = max(numbered, key=lambda index: (counts[index], -index), default=None)
        for name, *parts in members:
            places[name] = _place(parts, layer)
    return places


def _place(parts: list[str], layer: int | None) -> Place:
    if layer is None:
        return Place("", None, ".".join(parts))
    return Place(".".join(parts[:layer]), int(parts[layer]), ".".join(parts[layer + 1 :]))


def _pooled(parts: list[str]) -> list[str]:
    """Return a name's parts with `*` for the number of an expert."""
    before = ["", *parts[:-1]]
    return ["*" if _is_number(part) and "expert" in last.lower() else part for last, part in zip(before, parts)]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10  # ten digits are a hash, not a layer
