"""Text and numbers as the page shows them; every name passes through `shown`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from loftq_cli.hub.secrets import redact
from loftq_cli.machine.printable import printable


def shown(text: object) -> str:
    """Return text for an element or an attribute: escaped, without control and bidirectional characters or secrets."""
    return html.escape(printable(redact(str(text))))


def breakable(name: object) -> str:
    """Return a name as `shown` does, with places for a line break after its separators."""
    return re.sub(r"(?<=[./_-])(?=\w)", "<wbr>", shown(name))


def clipped(text: str, length: int) -> str:
    """Return text of at most `length` characters; the end, which tells modules apart, stays."""
    return text if len(text) <= length else "…" + text[len(text) - length + 1 :]


def number(value: float) -> str:
    """Return up to four significant digits without trailing zeros, such as `64`, `2.25` or `0.0312`."""
    return f"{value:.4g}"


def residual(value: float) -> str:
    """Return a residual with four decimals, or in scientific notation where those would be zeros."""
    return f"{value:.4f}" if value == 0 or value >= 0.001 else f"{value:.1e}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells that are HTML already. It scrolls sideways where it is too wide for the screen."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(_row(row) for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
