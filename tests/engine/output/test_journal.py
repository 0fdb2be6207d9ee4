"""The journal: damaged lines are ignored, so that their units are done again; lines of loftq 0.1 are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loftq_cli.engine.output.journal import Entry, Header, Journal

HASH = "0" * 64


def test_headers(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.read_header() is None and journal.entries() == {}
    header = Header("f", {"bits": 2}, "s", {"model.safetensors": "1 2"})
    journal.begin(header)
    journal.add(Entry("x", {"x": HASH}, None))
    assert journal.read_header() == header and journal.entries() == {"x": Entry("x", {"x": HASH}, None)}
    (tmp_path / "journal").write_text('{"fingerprint": "f", "recipe": {}}\n')
    assert journal.read_header() == Header("f", {}), "the first versions recorded no source"


@pytest.mark.parametrize("first", ["", "{}", "[]", '{"recipe": 3, "fingerprint": 4}', '{"tensor": "x", "hashes": {}}'])
def test_a_first_line_that_is_no_header(first: str, tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(first + "\n")
    assert Journal(tmp_path / "journal").read_header() is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor": 3},
        {"hashes": []},
        {"hashes": {"x": "short"}},
        {"hashes": {"x": 3}},
        {"record": {}},
        {"record": {"tensor": "x"}},
        {"more": 1},
    ],
)
def test_damaged_entries_are_ignored(fields: dict, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.begin(Header("f", {}))
    journal.add(Entry("y", {"y": HASH}, None))
    with open(tmp_path / "journal", "a") as file:
        file.write(json.dumps({"tensor": "x", "hashes": {"x": HASH}, "record": None} | fields) + "\n")
        file.write('{"tensor": "z", "ha')
    assert set(journal.entries()) == {"y"}
    journal.add(Entry("z", {"z": HASH}, None))
    assert set(journal.entries()) == {"y", "z"}
