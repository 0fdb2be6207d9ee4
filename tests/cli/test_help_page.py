"""Help pages: whole at 80 columns, brief by default, complete on request."""

from __future__ import annotations

import re

import pytest
from support.commands import runner

from loftq_cli.cli import app, command_with_options
from loftq_cli.cli.help_page import COMMON

COMMANDS = ("quantize", "plan", "batch", "merge", "inspect", "eval", "report", "push", "schema", "verify")


def page(*words: str, columns: int = 80) -> str:
    result = runner.invoke(app, [*words], prog_name="loftq", env={"COLUMNS": str(columns)})
    assert result.exit_code == 0 and not result.stderr
    return result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", [80, 120])
def test_every_line_fits_and_no_word_is_broken(command: str, columns: int) -> None:
    words = [*([command] if command else []), "--help-all" if command in ("quantize", "plan") else "--help"]
    text = page(*words, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    wide = re.sub(r"\\\n\s*", "", page(*words, columns=1000))
    narrow = re.sub(r"\\\n\s*", "", text)
    assert re.sub(r"\s+", "", narrow) == re.sub(r"\s+", "", wide)
    assert set(narrow.split()) - set(wide.split()) == set() or "|" in narrow


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_the_page_shows_common_options_and_help_all_the_rest(command: str) -> None:
    brief, whole = page(command, "--help"), page(command, "--help-all")
    flags = {
        next(flag for flag in option.opts if flag.startswith("--")): option.name
        for option in command_with_options(command).params
        if option.param_type_name == "option"
    }
    assert all(re.search(rf"{flag}\b", whole) for flag in flags)
    shown = {flag for flag in flags if re.search(rf"^  (-\w, )?{flag}\b", brief, re.MULTILINE)}
    assert {flags[flag] for flag in shown} == COMMON & set(flags.values())
    assert f"{len(flags) - len(shown)} more options: loftq {command} --help-all" in brief
    assert "more options" not in whole and "<bool>" not in whole


def test_the_page_of_quantize_reads_like_this() -> None:
    text = page("quantize", "--help")
    assert text.startswith("Usage: loftq quantize [OPTIONS] [MODEL]\n\nConvert a checkpoint to a quantized backbone")
    assert "  -b, --bits 2|3|4|8    Bits per weight, or a mean such as 2.5. [default: 4]\n" in text
    assert "  -r, --rank N          Rank of the adapter. [default: 16]\n" in text
    assert "\n\nQuantization:\n" in text and text.rstrip().endswith("--help-all")


def test_short_flags_are_the_long_ones() -> None:
    params = {param.name: param.opts for param in command_with_options("quantize").params}
    shorts = {"bits": "-b", "rank": "-r", "method": "-m", "format": "-f", "output": "-o"}
    assert {name: [flag for flag in params[name] if len(flag) == 2] for name in shorts} == {
        name: [flag] for name, flag in shorts.items()
    }


def test_no_argument_prints_the_page_and_fails() -> None:
    result = runner.invoke(app, [], prog_name="loftq")
    assert result.exit_code == 2 and "Usage: loftq COMMAND [OPTIONS]" in result.output
