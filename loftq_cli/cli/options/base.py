"""Helpers to declare options, with defaults shown in the help text and shell completion of choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def option(*flags: str, help: str, panel: str, shown: str = "", **more: Any) -> Any:
    """Declare an option whose help text ends with the default `shown`, or with none if that is empty."""
    # Typer would put a default that is only text in extra parentheses: "[default: (16)]".
    text = f"{plain(help)} [dim]\\[default: {plain(shown)}][/]" if shown else plain(help)
    return typer.Option(*flags, help=text, rich_help_panel=panel, show_default=False, **more)


def plain(text: str) -> str:
    """Return a help text whose brackets are shown and not read as markup."""
    return text.replace("[", "\\[")


def choice_of(values: Sequence[str]) -> dict[str, Any]:
    """Return arguments for an option with these values: the help lists them, and the shell completes them."""
    return {
        "metavar": "|".join(values),
        "autocompletion": lambda incomplete: [value for value in values if value.startswith(incomplete)],
    }
