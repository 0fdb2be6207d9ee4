"""The journal of finished units: one line of JSON each, written only after the unit's bytes are on the disk.

The first line identifies the conversion (its fingerprint, recipe and source). Lines that are damaged, for example by a
crash in the middle of a write, are ignored. Each worker appends to a file of its own (`journal.…`) beside the main one,
so that no two processes append to the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.machine.json_record import InvalidRecord, Sha256, json_record, read_json
from loftq_cli.tensorfile.writer import tensor_bytes


@json_record
@dataclass(frozen=True)
class Entry:
    """A finished unit: the sha256 of each of its output tensors, and its record (None for a copied tensor)."""

    tensor: str
    hashes: Mapping[str, Sha256]
    record: MatrixRecord | None


@json_record
@dataclass(frozen=True)
class Header:
    """The conversion that a journal belongs to.

    Attributes:
        source: the source's fingerprint, taken from its headers.
        files: size and a hash of a sample of the content, for each file of the source on this machine
            (`engine.output.source_sample`).
    """

    fingerprint: str
    recipe: Mapping[str, Any]
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """An append-only file of finished units."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: dict[Path, int] = {}

    def read_header(self) -> Header | None:
        """Return the conversion that this journal belongs to, None if there is none yet."""
        return _header(_content(self._path))

    def entries(self) -> dict[str, Entry]:
        """Return the finished units of all workers by tensor name."""
        return {entry.tensor: entry for path in self._paths() for entry in _entries(_content(path))}

    def new_entries(self) -> list[Entry]:
        """Return what was added to any worker's file since the last call."""
        found: list[Entry] = []
        for path in self._paths():
            content = _content(path)[self._read.get(path, 0) :]
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            found += _entries(whole)
        return found

    def of_worker(self, name: str) -> Journal:
        """Return the journal that one worker writes; `entries` of this one includes it."""
        journal = Journal(self._path.with_name(f"{self._path.name}.{name}"))
        journal._path.touch()
        return journal

    def begin(self, header: Header) -> None:
        """Start a new journal."""
        self._path.write_bytes(b"")
        self._append(dataclasses.asdict(header))

    def add(self, entry: Entry) -> None:
        """Record a unit; its bytes must be on the disk."""
        self._append(dataclasses.asdict(entry))

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self._path, "ab") as handle:
            # End an incomplete last line first, so that this entry does not become part of it.
            handle.write(b"" if self._ends_with_newline() else b"\n")
            handle.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _ends_with_newline(self) -> bool:
        with open(self._path, "rb") as handle:
            if handle.seek(0, os.SEEK_END) == 0:
                return True
            handle.seek(-1, os.SEEK_END)
            return handle.read(1) == b"\n"

    def _paths(self) -> list[Path]:
        return sorted(self._path.parent.glob(f"{self._path.name}*"))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _header(content: bytes) -> Header | None:
    """Return the first line that is complete JSON, if it is a header."""
    for line in content.splitlines():
        try:
            return read_json(Header, line)
        except InvalidRecord as error:
            if error.is_json:
                return None
    return None


def _entries(content: bytes) -> Iterator[Entry]:
    for line in content.splitlines():
        with suppress(InvalidRecord):  # the header, or a damaged line, whose unit is done again
            yield read_json(Entry, line)


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the sha256 of every tensor's bytes."""
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
