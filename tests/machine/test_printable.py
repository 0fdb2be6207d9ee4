"""Text from elsewhere is printed without control characters, secrets, or characters that the stream lacks."""

from __future__ import annotations

import json

import pytest

from loftq_cli.machine.printable import encodable, json_text, markdown_cell, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("é → 日本", "é → 日本"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\n::error::b\r", "a\\n::error::b\\r"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("\u202eabc\u2066\u200b\ufeff", "\\u202eabc\\u2066\\u200b\\ufeff"),
        ("\u2028\udcff\U000e0041", "\\u2028\\udcff\\U000e0041"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown == printable(shown) and printable(shown).isprintable()


def test_line_feeds_can_be_kept() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_names_cannot_become_markdown() -> None:
    assert markdown_cell("a|b`c\x1b[2J\n<script>\u202e") == "a?b?c\\x1b?2J\\n?script?\\u202e"
    assert markdown_cell("![x](https://host/f) **b** ~~c~~") == "!?x?(https://host/f) ??b?? ??c??"
    assert markdown_cell("model.layers.0.q_proj") == "model.layers.0.q_proj"


def test_other_encodings_get_replacements() -> None:
    assert encodable("1 → 2 × 3 é", "ascii") == "1 -> 2 x 3 \\xe9"
    assert encodable("1 → é", "latin-1") == "1 -> é" and encodable("→", "utf-8") == "→"


def test_json_stays_json() -> None:
    content = {"a\x9b": ["\u202e", "é", "\ud800", "\U000e0041", "\n"]}
    for encoding in ("utf-8", "ascii"):
        text = json_text(content, encoding)
        assert json.loads(text) == content and text.replace("\n", "").isprintable()
        text.encode(encoding)
    assert "é" in json_text(content) and "é" not in json_text(content, "ascii")
