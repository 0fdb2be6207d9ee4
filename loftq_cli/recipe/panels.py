"""Panels of the help pages, in order. In their own file so that `loftq --help` does not import pydantic."""

from __future__ import annotations

WHERE = "Output"
WHAT = "What to convert"
GRID = "Quantization"
LOFTQ = "LoftQ"
RUN = "Running"
SHOW = "Showing"
ORDER = (WHERE, WHAT, GRID, LOFTQ, RUN, SHOW)
