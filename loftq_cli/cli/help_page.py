"""Help pages that stay whole in a terminal of 80 columns: flags on one line, their meaning below or beside them."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

# Of the commands with dozens of options, those that most people use; --help-all shows the rest.
COMMON = frozenset(
    {
        "output", "overwrite", "push_to", "config", "stream", "rule", "exclude", "bits", "target_size", "format",
        "method", "rank", "iters", "calibrate", "device", "json", "help",
    }
)  # fmt: skip
SHOW_ALL = "loftq.help_all"  # key in the context
_MANY = 30  # options of a command whose page shows only the common ones
_INDENT, _WIDEST = 24, 100
_TOLD_DEFAULT = re.compile(r"\s*\[dim\]\\?\[default: (?P<value>.*?)\]\[/\]$")
_KINDS = {"INT": "N", "INTEGER": "N", "FLOAT": "X", "STR": "TEXT"}


@dataclass(frozen=True)
class Row:
    """A line of a help page: `--bits 2|3|4|8` and its meaning with the default, if any."""

    name: str
    meaning: str


class HelpfulCommand(TyperCommand):
    """A command whose help page is made here and not by Typer, which breaks words and cells at 80 columns."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page; Typer prints nothing more."""
        typer.echo(command_page(self, ctx, page_width()), nl=False)


def page_width() -> int:
    """Return the width to fill: the terminal's, unless lines would be too long to read."""
    return min(_WIDEST, max(40, shutil.get_terminal_size().columns))


def command_page(command: Any, context: Any, width: int) -> str:
    """Return the help page of one command."""
    listed = [p for p in command.get_params(context) if not getattr(p, "hidden", False)]
    arguments = [p for p in listed if p.param_type_name == "argument"]
    options = [p for p in listed if p.param_type_name == "option"]
    brief = len(options) > _MANY and not context.meta.get(SHOW_ALL)
    shown = [p for p in options if p.name in COMMON] if brief else options
    parts = [f"Usage: loftq {command.name} [OPTIONS] {' '.join(map(_argument, arguments))}".rstrip()]
    parts += _paragraphs(command.help or "", width)
    if arguments:
        parts.append(_section("Arguments", (Row(value_of(p), meaning_of(p)[0]) for p in arguments), width))
    for panel, members in panels_of(shown).items():
        parts.append(_section(panel, map(option_row, members), width))
    if brief:
        rest = len(options) - len(shown)
        parts.append(f"{rest} more options: loftq {command.name} --help-all")
    return "\n\n".join(parts) + "\n"


def root_page(group: Any, context: Any, width: int) -> str:
    """Return the help page of the program: its commands and its own options."""
    panels: dict[str, list[Row]] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        first = re.split(r"(?<=\.)\s", " ".join((command.help or "").split()), maxsplit=1)[0]
        panels.setdefault(command.rich_help_panel or "Commands", []).append(Row(name, first))
    parts = ["Usage: loftq COMMAND [OPTIONS]", *_paragraphs(group.help or "", width)]
    parts += [_section(panel, rows, width) for panel, rows in panels.items()]
    options = [p for p in group.get_params(context) if not getattr(p, "hidden", False)]
    parts.append(_section("Options", map(option_row, options), width))
    return "\n\n".join([*parts, *_paragraphs(group.epilog or "", width)]) + "\n"


def panels_of(options: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the options by panel, in the order in which they are declared; options without a panel come last."""
    found: dict[str, list[Any]] = {}
    for option in sorted(options, key=lambda option: getattr(option, "rich_help_panel", None) is None):
        found.setdefault(getattr(option, "rich_help_panel", None) or "Help", []).append(option)
    return found


def option_row(option: Any) -> Row:
    """Return an option as its page shows it."""
    flags = sorted(option.opts, key=lambda flag: flag.startswith("--"))
    name = ", ".join([*flags, *option.secondary_opts])
    if not option.is_flag:
        name += f" {value_of(option)}"
    meaning, default = meaning_of(option)
    return Row(name, f"{meaning} [default: {default}]" if default else meaning)


def meaning_of(parameter: Any) -> tuple[str, str]:
    """Return the help text of a parameter and its default, or "" if it has none to show."""
    text = parameter.help or ""
    told = _TOLD_DEFAULT.search(text)
    default = told["value"] if told else ""
    if not told and parameter.default not in (None, False, (), []) and not callable(parameter.default):
        default = str(parameter.default)
    plain = _TOLD_DEFAULT.sub("", text).replace("\\[", "[")
    return plain, default.replace("\\[", "[")


def value_of(parameter: Any) -> str:
    """Return the placeholder of a parameter's value."""
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        return str(parameter.name.upper())
    return _KINDS.get(_kind(parameter), _kind(parameter))


def _kind(parameter: Any) -> str:
    """Return the type of an option without a metavar; Typer has named its types in two ways."""
    if hasattr(parameter, "type"):
        return str(parameter.type.name).upper()
    annotation = parameter.type_descriptor.annotation
    return str(getattr(annotation, "__name__", annotation)).upper()


def _argument(parameter: Any) -> str:
    name = value_of(parameter) + ("..." if parameter.nargs != 1 else "")
    return name if parameter.required else f"[{name}]"


def _paragraphs(text: str, width: int) -> list[str]:
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()) if part]
    return [_example(part, width) or textwrap.fill(part, width, break_on_hyphens=False) for part in paragraphs]


def _example(paragraph: str, width: int) -> str:
    """Return `Example: loftq ...` as a command that can be copied; "" if the paragraph is none."""
    found = re.fullmatch(r"Examples?: (loftq .*)", paragraph)
    if found is None:
        return ""
    lines = textwrap.wrap(found[1], width - 4, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([typer.style("Example:", bold=True), "  " + " \\\n  ".join(lines)])


def _section(title: str, rows: Iterable[Row], width: int) -> str:
    return "\n".join([typer.style(f"{title}:", bold=True), *(_row(row, width) for row in rows)])


def _row(row: Row, width: int) -> str:
    """Return `  --flag VALUE   meaning`, with the meaning on lines of its own if the flag is long."""
    meaning = textwrap.wrap(row.meaning, width - _INDENT, break_on_hyphens=False, break_long_words=False)
    first = f"  {row.name}"
    if len(first) > _INDENT - 2:
        return "\n".join([*_broken(first, width), *(" " * _INDENT + line for line in meaning)])
    lines = [first.ljust(_INDENT) + (meaning[0] if meaning else ""), *(" " * _INDENT + line for line in meaning[1:])]
    return "\n".join(line.rstrip() for line in lines)


def _broken(text: str, width: int) -> list[str]:
    """Break a long list of choices after a `|`."""
    lines, line = [], ""
    for piece in re.split(r"(?<=\|)", text):
        if line and len(line) + len(piece) > width:
            lines.append(line)
            line = "      "
        line += piece
    return [*lines, line]
