"""What is done, one line a unit, written only after the unit's bytes are on the disk.

The first line names the conversion (its fingerprint and recipe); a line that a crash tore is ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq_cli.artifacts.manifest import MatrixRecord, parse_matrix_record
from loftq_cli.engine.writer import tensor_bytes


@dataclass(frozen=True)
class Entry:
    """A finished unit: the hash of its output bytes and its record (None for a copied tensor)."""

    tensor: str
    sha256: str
    record: MatrixRecord | None


@dataclass(frozen=True)
class Header:
    """Which conversion a journal belongs to."""

    fingerprint: str
    recipe: Mapping[str, Any]


class Journal:
    """Append-only file of finished units."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_header(self) -> Header | None:
        """The conversion that this journal belongs to; None where there is none yet."""
        for line in self._lines():
            known = isinstance(line.get("recipe"), dict)
            return Header(str(line.get("fingerprint")), line["recipe"]) if known else None
        return None

    def entries(self) -> dict[str, Entry]:
        """Finished units by tensor name."""
        found = {}
        for line in self._lines():
            if isinstance(line.get("tensor"), str):
                with suppress(KeyError, TypeError):  # a damaged line: its unit is done again
                    record = parse_matrix_record(line["record"]) if line["record"] else None
                    found[line["tensor"]] = Entry(line["tensor"], line["sha256"], record)
        return found

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

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        for line in content.splitlines():
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict):
                yield parsed


def hash_tensors(contents: Mapping[str, Tensor | bytes]) -> str:
    """One sha256 over names and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        content = contents[name]
        digest.update(name.encode())
        digest.update(content if isinstance(content, bytes) else tensor_bytes(content))
    return digest.hexdigest()
