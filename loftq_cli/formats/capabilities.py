"""Render the docs' table of containers from their declarations."""

from __future__ import annotations

from loftq_cli.formats.container import UPSTREAM, Claim
from loftq_cli.formats.registry import FORMATS


def markdown_table() -> str:
    """Return the table, one row for each container."""
    lines = ["| `--format` | bits | levels | loads exactly | trains | serves |", "|---|---|---|---|---|---|"]
    for container in FORMATS.values():
        item = container.capability
        claims = [_cell(claim) for claim in (item.exact, item.trains, item.serves)]
        bits = ", ".join(str(width) for width in item.bits)
        lines.append(f"| `{container.name}` | {bits} | {item.levels} | {' | '.join(claims)} |")
    return "\n".join(lines)


def _cell(claim: Claim) -> str:
    return f"{claim.text} ¹" if claim.proof == UPSTREAM else claim.text
