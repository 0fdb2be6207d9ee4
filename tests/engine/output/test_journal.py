"""The journal: damaged lines are ignored, so that their units are converted again; lines of loftq 0.1 are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from loftq_cli.engine.output.journal import Entry, Header, Journal, _line
from loftq_cli.errors import LoftqError

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
    with open(tmp_path / "journal", "ab") as file:
        file.write(_line({"tensor": "x", "hashes": {"x": HASH}, "record": None} | fields) + b"\n")
        file.write(b'{"tensor": "z", "ha')
    assert set(journal.entries()) == {"y"}
    journal.add(Entry("z", {"z": HASH}, None))
    assert set(journal.entries()) == {"y", "z"}


def test_no_flipped_bit_gives_another_entry(tmp_path: Path) -> None:
    journal, entry, header = (
        Journal(tmp_path / "journal"),
        Entry("x", {"x": HASH}, None, HASH),
        Header("f", {"bits": 2}),
    )
    journal.begin(header)
    journal.add(entry)
    whole = (tmp_path / "journal").read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            (tmp_path / "journal").write_bytes(damaged)
            assert journal.read_header() in (None, header)
            if journal.read_header() is not None:
                assert journal.entries() in ({}, {"x": entry}), (position, bit)


def test_lines_of_0_1_without_hashes_are_read_only_in_a_journal_of_0_1(tmp_path: Path) -> None:
    line = json.dumps({"tensor": "x", "hashes": {"x": HASH}, "record": None}) + "\n"
    (tmp_path / "journal").write_text('{"fingerprint": "f", "recipe": {}}\n' + line)
    journal = Journal(tmp_path / "journal")
    assert journal.entries() == {"x": Entry("x", {"x": HASH}, None)}
    journal.add(Entry("y", {"y": HASH}, None, HASH))
    assert set(journal.entries()) == {"x", "y"}
    journal.begin(Header("f", {}))
    with open(tmp_path / "journal", "a") as file:
        file.write(line)
    assert journal.entries() == {}


def test_a_journal_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "journal").symlink_to(tmp_path / "outside")
    journal = Journal(tmp_path / "journal")
    for call in (journal.read_header, journal.entries, lambda: journal.add(Entry("x", {}, None))):
        with pytest.raises(LoftqError, match="is a link"):
            call()
    journal.begin(Header("f", {}))
    assert (tmp_path / "outside").read_text() == "precious" and journal.read_header() is not None
    (tmp_path / "journal").unlink()
    os.mkfifo(tmp_path / "journal")
    with pytest.raises(LoftqError, match="not a regular file"):
        journal.entries()
