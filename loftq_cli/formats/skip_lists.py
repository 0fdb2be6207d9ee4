"""Entries of skip lists for matrices in full precision that are not linear layers of the running model.

transformers ignores some of them (layers for multi-token prediction) and stacks others (experts), but serving engines
build a layer for each and quantize it unless the list names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loftq_cli.formats.base import QuantizedMatrix


def kept_patterns(kept: Sequence[str], listed: Sequence[str], quantized: Sequence[QuantizedMatrix]) -> tuple[str, ...]:
    """Return regexes that match the kept matrices which are not listed yet, and no quantized matrix.

    One pattern covers all layers and experts if none of them is quantized, since there may be tens of thousands.

    Args:
        kept: names on disk, without `.weight`.
        listed: names that the list has already.
    """
    own_names = {name for matrix in quantized for name in (matrix.prefix, matrix.module)}
    quantized_shapes = {any_number(name) for name in own_names}
    last_numbers = {_last_number(name) for name in own_names}
    found = []
    for name in kept:
        if name in listed or name in own_names:
            continue
        if any_number(name) not in quantized_shapes:
            found.append(any_number(name))
        elif _last_number(name) not in last_numbers:
            found.append(_last_number(name))
        else:
            found.append(f"^{re.escape(name)}$")
    return tuple(dict.fromkeys(found))


def any_number(name: str) -> str:
    """Return a regex for the modules of this name in all layers and experts."""
    return "^" + re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(name)) + "$"


def _last_number(name: str) -> str:
    """Return a regex for the modules of this name in one layer, for all experts."""
    head, number, tail = re.fullmatch(r"(?:(.*\.)(\d+)(?=\.))?(.*)", name).groups()  # type: ignore[union-attr]
    return f"^{re.escape(head)}\\d+{re.escape(tail)}$" if number else f"^{re.escape(name)}$"
