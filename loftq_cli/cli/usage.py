"""One sentence for a command line that Typer cannot parse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def is_usage_error(error: BaseException) -> bool:
    """Return True for an error of Typer about the command line; their common class has no public name."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def usage_sentence(error: Any) -> str:
    """Return a usage error as a sentence: what is wrong, and what to give instead or where to look it up."""
    command = _command(getattr(error, "ctx", None))
    see = f"see `{' '.join(dict.fromkeys(['loftq', command]))} --help`."
    text = error.format_message().strip().rstrip(".")
    near = getattr(error, "possibilities", None)
    if text.startswith("No such option"):
        return f"{command} has no option {error.option_name}: {_did_you_mean(near, see)}"
    if found := re.fullmatch(r"No such command (['\"])(.*?)\1(?:\. Did you mean '(.*?)'\?)?", text, re.DOTALL):
        return f"there is no command {found[2]}: {_did_you_mean([found[3]] if found[3] else None, see)}"
    if found := re.fullmatch(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", text):
        return f"{command} does not expect {found[1]}: remove it, or {see}"
    if found := re.fullmatch(r"Option '(.*)' requires an argument", text):
        return f"{found[1]} needs a value: give one after it."
    if found := re.fullmatch(r"Invalid value for ('?.*?'?): (.*)", text, re.DOTALL):
        return f"{_subject(error, found[1])} has an invalid value: {_wanted(found[2])}"
    if text.startswith("Missing "):
        return f"{command} needs {_subject(error, text.split(' ', 2)[-1])}: {see}"
    return f"{_lower(text)}: {see}"


def _did_you_mean(near: Sequence[str] | None, otherwise: str) -> str:
    return f"did you mean {near[0]}?" if near else otherwise


def _wanted(reason: str) -> str:
    """Return how to correct a value from the reason that Typer gives, which may quote pydantic."""
    for word, wanted in (("integer", "a whole number"), ("number", "a number"), ("boolean", "true or false")):
        if word in reason:
            return f"give {wanted}."
    return f"{_lower(reason)}."


def _command(context: Any) -> str:
    """Return the command's name, or `loftq` for the program itself."""
    return context.info_name if context is not None and context.parent is not None else "loftq"


def _subject(error: Any, hint: str) -> str:
    """Return the longest flag of the option, or the name of the argument."""
    flags = list(getattr(getattr(error, "param", None), "opts", ()) or ())
    long = [flag for flag in flags if flag.startswith("--")]
    return (long or [hint.strip("'.").split("'")[0].upper()])[0]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
