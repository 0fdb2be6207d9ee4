"""What is done, one line a unit, written only after the unit's bytes are on the disk.

The first line names the conversion (its fingerprint, recipe and source); a line that a crash tore is ignored. Workers
append to files of their own (`journal.…`) beside the main one, so that no two processes share an append.
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

from loftq_cli.artifacts.manifest import MatrixRecord, parse_matrix_record
from loftq_cli.tensorfile.writer import tensor_bytes


@dataclass(frozen=True)
class Entry:
    """A finished unit: the sha256 of each of its output tensors and its record (None for a copied tensor)."""

    tensor: str
    hashes: Mapping[str, str]
    record: MatrixRecord | None


@dataclass(frozen=True)
class Header:
    """Which conversion a journal belongs to.

    Attributes:
        source: the source's fingerprint by headers.
        files: of every file of the source that is on this machine, size and a sample of the content
            (`engine.source`).
    """

    fingerprint: str
    recipe: Mapping[str, Any]
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """Append-only file of finished units."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: dict[Path, int] = {}

    def read_header(self) -> Header | None:
        """The conversion that this journal belongs to; None where there is none yet."""
        for line in _lines(_content(self._path)):
            return _header(line) if isinstance(line.get("recipe"), dict) else None
        return None

    def entries(self) -> dict[str, Entry]:
        """Finished units by tensor name, of all workers."""
        return {entry.tensor: entry for path in self._paths() for entry in _entries(_content(path))}

    def new_entries(self) -> list[Entry]:
        """What was added to any worker's file since the last call."""
        found: list[Entry] = []
        for path in self._paths():
            content = _content(path)[self._read.get(path, 0) :]
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            found += _entries(whole)
        return found

    def of_worker(self, name: str) -> Journal:
        """The journal a worker writes; `entries` of this one read it too."""
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
            # A torn line before this one gets its own end, so that it cannot swallow this entry.
            handle.write(b"" if self._ends_whole() else b"\n")
            handle.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _ends_whole(self) -> bool:
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


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            yield parsed


def _header(line: Mapping[str, Any]) -> Header:
    files = line.get("files")
    return Header(
        str(line.get("fingerprint")), line["recipe"], str(line.get("source")), files if isinstance(files, dict) else {}
    )


def _entries(content: bytes) -> Iterator[Entry]:
    for line in _lines(content):
        if isinstance(line.get("tensor"), str) and isinstance(line.get("hashes"), dict):
            with suppress(KeyError, TypeError):  # a damaged line: its unit is done again
                record = parse_matrix_record(line["record"]) if line["record"] else None
                yield Entry(line["tensor"], line["hashes"], record)


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of every tensor's bytes."""
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
