"""HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

from loftq_cli.machine.printable import printable


def html_table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of labels and values under a caption; every text is escaped."""
    lines = (f"<tr><th>{_escaped(label)}</th><td>{_escaped(value)}</td></tr>" for label, value in rows)
    return f"<table><caption>{_escaped(caption)}</caption><tbody>{''.join(lines)}</tbody></table>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))
