"""Reference tables: commands and their options, recipe fields, containers, public Python names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import typer.main

import loftq_cli
from loftq_cli.cli import app
from loftq_cli.cli.help_page import meaning_of, value_of
from loftq_cli.errors import ExitCode
from loftq_cli.recipe.table import markdown_table

_EXIT_CODES = {
    ExitCode.DONE: "Done.",
    ExitCode.FAILED: "Failed: the message says why.",
    ExitCode.USAGE: "A flag, a recipe field or an argument is wrong.",
    ExitCode.VERIFICATION_FAILED: "`loftq verify` found a difference.",
    ExitCode.INCOMPLETE: "Incomplete: run the same command again to go on.",
    ExitCode.INTERRUPTED: "Interrupted (Ctrl-C): finished work is kept, the same command goes on.",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def commands() -> str:
    """Every command with its arguments and options, grouped as `--help` groups them."""
    root: Any = typer.main.get_command(app)
    context = root.make_context("loftq", [], resilient_parsing=True)
    # As when it is called: only then does a command have all its options.
    found = {name: root.resolve_command(context, [name])[1] for name in root.list_commands(context)}
    return "\n\n".join(_command(name, command) for name, command in found.items() if not command.hidden)


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join(["loftq", name, *(_argument(p) for p in arguments), "[OPTIONS]"])
    parts = [f"## loftq {name}", _prose(command.help or ""), f"```text\n{usage}\n```"]
    if arguments:
        parts.append(table(("argument", "meaning"), [(f"`{value_of(p)}`", meaning_of(p)[0]) for p in arguments]))
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Other options", []).append(option)
    for panel, members in panels.items():
        parts += [f"**{panel}**", table(("option", "value", "default", "meaning"), [_option(p) for p in members])]
    return "\n\n".join(parts)


def _argument(parameter: Any) -> str:
    shown = value_of(parameter)
    return shown if parameter.required else f"[{shown}]"


def _option(parameter: Any) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    meaning, default = meaning_of(parameter)
    value = "" if parameter.is_flag else value_of(parameter)
    return names, f"`{value}`" if value else "", f"`{default}`" if default else "", meaning


def _prose(help_text: str) -> str:
    """A command's help; its example becomes a block of code."""
    paragraphs = []
    for paragraph in help_text.replace("\f", "").split("\n\n"):
        text = " ".join(paragraph.split())
        example = re.match(r"Examples?: (loftq .*)", text)
        paragraphs.append(f"Example:\n\n```text\n{example[1]}\n```" if example else text)
    return "\n\n".join(paragraphs)


def recipe_fields() -> str:
    """Every field of a recipe file, from its declaration."""
    return markdown_table()


def containers() -> str:
    """What each container holds and what reads it, from the containers' own declarations."""
    from loftq_cli.formats.capabilities import markdown_table

    return markdown_table()


def python_names() -> str:
    """A mkdocstrings directive for every public name of the package: functions first, then types."""
    names = [name for name in loftq_cli.__all__ if not name.startswith("_")]
    functions = sorted(name for name in names if name[0].islower())
    types = sorted(name for name in names if name[0].isupper())
    blocks = [f"## Functions\n\n{_directives(functions)}", f"## Types\n\n{_directives(types)}"]
    return "\n\n".join(blocks)


def _directives(names: Iterable[str]) -> str:
    return "\n\n".join(f"::: loftq_cli.{name}" for name in names)


def exit_codes() -> str:
    """The exit codes of the command line."""
    return table(("code", "meaning"), [(f"`{int(code)}`", _EXIT_CODES[code]) for code in ExitCode])
