"""Matrices a panel of rows at a time, where one operation after the other on all of it would go through memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PANEL = 1 << 22  # elements: few enough to stay in a CPU's cache and to need no memory, enough to keep a GPU busy


def panels(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of `x` [rows, columns]."""
    step = max(1, _PANEL // max(1, x.shape[1]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))
