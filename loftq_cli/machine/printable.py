"""Text that is safe to print: no control or bidirectional characters, and no markup in tables and headings.

Names of tensors, files and models come from checkpoints that other people made. Everything that goes to a terminal, a
log, a report or a card passes through here. Tokens and signatures of links are removed by `machine.secrets`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_MARKUP = str.maketrans(dict.fromkeys("|`<>[]*~", "?"))  # underscores are in most names, and harmless
_UNUSUAL = re.compile(r"[^\n -~]")
# Replacements of our own characters for terminals that are not in UTF-8.
_ASCII: Mapping[str, str] = {"→": "->", "×": "x", "…": "...", "–": "-", "−": "-", "‖": "||", "·": "*", "≈": "~"}


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with every character that is not printable as an escape such as `\x1b`, `\n` or `\u202e`.

    Args:
        keep: characters to leave as they are, such as "\n" for text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def markdown_cell(text: str) -> str:
    """Return text that cannot end a table cell, a code span or a heading, start a tag, or become a link or an image.

    Names of tensors and models stay as they are; characters that have a meaning in Markdown become question marks.
    """
    return printable(text).translate(_MARKUP)


def encodable(text: str, encoding: str) -> str:
    """Return the text with replacements for characters that an encoding such as ASCII or Latin-1 does not have."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join(_ASCII.get(character, character) for character in text)
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def json_text(content: Any, encoding: str = "utf-8") -> str:
    """Return indented JSON in which characters that are not printable or not in the encoding are escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return _UNUSUAL.sub(lambda match: _in_json(match[0], encoding), text)


def _in_json(character: str, encoding: str) -> str:
    fine = character.isprintable() and _has(encoding, character)
    return character if fine else json.dumps(character)[1:-1]


def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
