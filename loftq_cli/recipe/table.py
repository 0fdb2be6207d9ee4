"""The documentation's table of all recipe fields."""

from __future__ import annotations

from loftq_cli.recipe.field import Spec
from loftq_cli.recipe.model import recipe_specs

_TYPES = {str: "string", int: "integer", float: "number", bool: "true or false"}


def markdown_table() -> str:
    """Return a Markdown table of all fields: YAML key, flag, values, default and meaning, in the help page's order."""
    rows = ["| YAML key | flag | values | default | meaning |", "|---|---|---|---|---|"]
    rows += [_row(spec) for spec in recipe_specs().values()]
    return "\n".join(rows)


def _row(spec: Spec) -> str:
    cells = (
        f"`{spec.name}`",
        " ".join(f"`{flag}`" for flag in spec.flag.split("/") if flag),
        _values(spec),
        _cell(spec.shown_default),
        _cell(spec.help.text),
    )
    return f"| {' | '.join(cells)} |"


def _values(spec: Spec) -> str:
    """Return the field's choices, or its type and bounds."""
    if spec.listed:
        return ", ".join(f"`{choice}`" for choice in spec.listed)
    if spec.repeatable:
        return "list of strings"
    name = " or ".join(_TYPES[part] for part in spec.types)
    bounds = [f"at least {spec.least}"] * (spec.least is not None) + [f"at most {spec.most}"] * (spec.most is not None)
    return ", ".join([name, *bounds])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
