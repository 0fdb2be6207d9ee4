"""Process a matrix in panels of rows, so that a chain of operations stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PANEL = 1 << 22  # elements: few enough to stay in a CPU's cache, and enough to keep a GPU busy


def panels(x: Tensor) -> Iterator[slice]:
    """Return slices of the rows of `x` [rows, columns], one for each panel."""
    step = max(1, _PANEL // max(1, x.shape[1]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))
