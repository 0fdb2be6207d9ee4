"""Options generated from the fields of a recipe.

A command takes all fields that have a flag with `**recipe: Any`, or a single one with a parameter of the field's name
and type `FromRecipe`. `with_recipe_options` replaces both by the options. It imports pydantic, so it is called when a
command runs, not when the commands are listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

from loftq_cli.cli.options.base import choice_of, option
from loftq_cli.recipe.panels import ORDER

if TYPE_CHECKING:
    from loftq_cli.recipe.field import Spec

_MARK = object()
FromRecipe = Annotated[Optional[str], _MARK]
# Short flags of the options that people give most.
_SHORT = {"bits": ("-b",), "rank": ("-r",), "method": ("-m",), "format": ("-f",)}
# Options and the one that precedes each in its panel.
_BELOW = {"max_shard_size": "output", "stream": "revision"}


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with a signature that has every option, for Typer to read."""
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    if "recipe" not in signature.parameters and FromRecipe not in hints.values():
        return command
    from loftq_cli.recipe.model import recipe_specs

    def run(**values: Any) -> None:
        command(**{name: None if value == [] else value for name, value in values.items()})

    specs = recipe_specs()
    own = [_own(parameter, hints[name], specs) for name, parameter in signature.parameters.items() if name != "recipe"]
    if "recipe" in signature.parameters:
        own = _ordered(own + [_parameter(spec) for spec in specs.values() if spec.flag])
    run.__doc__ = command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in own}
    run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return run


def _own(parameter: Parameter, hint: Any, specs: dict[str, Spec]) -> Parameter:
    """Return a parameter that the command declares itself, as keyword-only so that any order is valid."""
    if hint == FromRecipe:
        return _parameter(specs[parameter.name])
    return parameter.replace(annotation=hint, kind=Parameter.KEYWORD_ONLY)


def _parameter(spec: Spec) -> Parameter:
    more: dict[str, Any] = choice_of(spec.listed) if spec.listed else {}
    if spec.help.metavar:
        more["metavar"] = spec.help.metavar
    flags = [spec.flag, *_SHORT.get(spec.name, ())]
    declared = option(*flags, help=spec.help.text, panel=spec.help.panel, shown=spec.shown_default, **more)
    kind: Any = list[str] if spec.repeatable else spec.types[0]
    annotation = Annotated[Optional[kind], declared]
    return Parameter(spec.name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _ordered(parameters: list[Parameter]) -> list[Parameter]:
    """Sort by panel; in each panel, the command's own options precede those of the recipe."""
    ordered = sorted(parameters, key=lambda parameter: (None, *ORDER).index(_panel(parameter)))
    names = [parameter.name for parameter in ordered]
    for name, above in _BELOW.items():
        if {name, above} <= set(names):
            names.remove(name)
            names.insert(names.index(above) + 1, name)
    return sorted(ordered, key=lambda parameter: names.index(parameter.name))


def _panel(parameter: Parameter) -> str | None:
    """Return the panel of an option, or None for an argument."""
    return parameter.annotation.__metadata__[0].rich_help_panel
