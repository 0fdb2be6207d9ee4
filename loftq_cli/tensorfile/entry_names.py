"""Names of parts of a tensor: the only module that builds and parses them.

| name | meaning |
|---|---|
| `X[3]` | entry 3 of the first dimension of tensor X |
| `X[8:12]` | entries 8 to 11 of the first dimension |
| `P[3]`, `P[3].1` | the matrix of expert 3 in the stacked parameter P; its part 1, if the parameter joins several |
| `X[3.1]` | the share of expert 3 (part 1) in the joint adapter factor X, before the shares are joined |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRIES = re.compile(r"(?P<whole>.*)\[(?P<first>\d+)(?::(?P<end>\d+))?\]", re.DOTALL)


@dataclass(frozen=True)
class Entries:
    """Entries of the first dimension of the tensor `whole`: one at `index`, or from there up to `end`.

    Attributes:
        end: the first entry after them; None for a single entry, whose tensor has one dimension less.
    """

    whole: str
    index: int
    end: int | None = None


def entry_name(whole: str, index: int) -> str:
    """Return the name of one entry of a tensor."""
    return f"{whole}[{index}]"


def entries_name(whole: str, first: int, count: int) -> str:
    """Return the name of `count` entries of a tensor."""
    return f"{whole}[{first}:{first + count}]"


def parse_entries(name: str) -> Entries | None:
    """Parse a name that `entry_name` or `entries_name` returned; None for the name of a whole tensor."""
    found = _ENTRIES.fullmatch(name)
    if found is None:
        return None
    return Entries(found["whole"], int(found["first"]), None if found["end"] is None else int(found["end"]))


def whole_name(name: str) -> str:
    """Return the tensor that an entry belongs to; the name of a whole tensor is returned unchanged."""
    found = parse_entries(name)
    return name if found is None else found.whole


def expert_name(parameter: str, index: int, part: int, parts: int) -> str:
    """Return the name of one expert's matrix in a stacked parameter, with its part if the parameter joins several."""
    name = entry_name(parameter, index)
    return f"{name}.{part}" if parts > 1 else name


def share_name(factor: str, index: int, part: int) -> str:
    """Return the name of one expert's share of an adapter factor that all experts of a parameter share."""
    return f"{factor}[{index}.{part}]"
