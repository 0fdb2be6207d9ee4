"""How options are declared: the help shows a default that is only told in dim letters, and choices complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def option(*flags: str, help: str, panel: str, shown: str = "", **more: Any) -> Any:
    """An option whose default is told by its help: `shown`, "" where there is nothing to tell."""
    # Typer would put a default that is only text in brackets of its own: "[default: (16)]".
    text = f"{help} [dim]\\[default: {shown}][/]" if shown else help
    return typer.Option(*flags, help=text, rich_help_panel=panel, show_default=False, **more)


def choice_of(values: Sequence[str]) -> dict[str, Any]:
    """Arguments for an option with these values: the help lists them, and the shell completes them."""
    return {
        "metavar": "|".join(values),
        "autocompletion": lambda incomplete: [value for value in values if value.startswith(incomplete)],
    }
