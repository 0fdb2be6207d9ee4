"""Panels of the help pages, in the order they are shown. They stand apart so that `loftq --help` needs no pydantic."""

from __future__ import annotations

WHERE = "Output"
WHAT = "What to convert"
GRID = "Quantization"
LOFTQ = "LoftQ"
RUN = "Running"
SHOW = "Showing"
ORDER = (WHERE, WHAT, GRID, LOFTQ, RUN, SHOW)
