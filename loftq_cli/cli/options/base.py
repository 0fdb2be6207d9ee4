"""How options are declared: a default that is only told stands dimmed behind the help, and choices complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from loftq_cli.recipe.model import CHOICES, recipe_fields

DEFAULTS = recipe_fields()
FIELD_HELPS: dict[str, str] = {}  # what is said of each recipe field, for the schema as well
WHAT, WHERE, GRID, LOFTQ, RUN, SHOW = (
    "What to convert",
    "Output",
    "Quantization",
    "LoftQ",
    "Running",
    "Showing",
)


def option(*flags: str, help: str, panel: str, shown: str = "", **more: Any) -> Any:
    """An option whose default is told by its help: `shown`, "" where there is nothing to tell."""
    # Typer would put a default that is only text in brackets of its own: "[default: (16)]".
    text = f"{help} [dim]\\[default: {shown}][/]" if shown else help
    return typer.Option(*flags, help=text, rich_help_panel=panel, show_default=False, **more)


def choice_of(values: Sequence[str]) -> dict[str, Any]:
    """What an option takes beside its help where it is one of these: they are shown, and complete in the shell."""
    return {
        "metavar": "|".join(values),
        "autocompletion": lambda incomplete: [value for value in values if value.startswith(incomplete)],
    }


def recipe_option(
    field: str,
    help: str,
    *,
    panel: str,
    flag: str = "",
    show: str | None = None,
    choices: tuple[object, ...] = (),
    **more: Any,
) -> Any:
    """An option of the recipe field `field`.

    Args:
        flag: the field's name with dashes, where none is given.
        show: stands in the help in place of the field's own default.
        choices: what it may be; those of the recipe's table, where there are any.
    """
    FIELD_HELPS[field] = help
    default = DEFAULTS[field]
    shown = show if show is not None else str(default) if default not in (None, ()) else ""
    values = [str(choice) for choice in choices or CHOICES.get(field, ())]
    if values:
        more |= choice_of(values)
    return option(flag or f"--{field.replace('_', '-')}", help=help, panel=panel, shown=shown, **more)
