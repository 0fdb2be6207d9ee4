"""Tables for terminals of 80 columns: names wrap at their separators, numbers are never cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WIDE = 100  # columns from which cells have room between them
_AFTER = re.compile(r"(?<=[./_\-])")


class Name:
    """A module, tensor or path as a cell, which wraps after `.`, `/`, `_` or `-` only."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, _AFTER.split(self.text))), len(self.text)).clamp(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in wrapped_name(self.text, options.max_width):
            yield Segment(line)
            yield Segment.line()


def wrapped_name(text: str, width: int) -> list[str]:
    """Return a name in lines of at most `width` characters, unless a part of it is longer."""
    lines, line = [], ""
    for part in _AFTER.split(text):
        if line and len(line) + len(part) > width:
            lines.append(line)
            line = ""
        line += part
    return [*lines, line]


def name_table(console: Console, *columns: str, right: Sequence[str] = ()) -> Table:
    """Return a table without lines; the columns in `right` hold numbers, which are not wrapped."""
    table = Table(box=None, padding=(0, 2 if console.width >= _WIDE else 1, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table
