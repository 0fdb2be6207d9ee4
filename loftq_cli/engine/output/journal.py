"""The journal of finished units: one line of JSON each, written only after the unit's bytes are on disk.

The first line identifies the conversion (its fingerprint, recipe and source). Every line ends with a sha256 of the rest
of the line. Damaged lines, for example after a crash in the middle of a write, are ignored, and so are lines whose hash
is wrong: their units are converted again. Journals of loftq 0.1 have no hashes, not even in the first line, and are
read as they are. Each worker appends to a file of its own (`journal.…`) beside the main one, so that no two processes
append to the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.machine.json_record import InvalidRecord, Sha256, json_record, read_json
from loftq_cli.tensorfile.writer import tensor_bytes

_MOST_BYTES = 2_000_000_000  # ten times that of the largest models
_CHECKED_LINE = re.compile(rb'(\{.+), "check": "([0-9a-f]{64})"\}', re.DOTALL)


@json_record
@dataclass(frozen=True)
class Entry:
    """A finished unit.

    Attributes:
        hashes: the sha256 of each of its output tensors.
        record: None for a copied tensor.
        source: the sha256 of its source tensor as it was read; "" in journals of loftq 0.1.
    """

    tensor: str
    hashes: Mapping[str, Sha256]
    record: MatrixRecord | None
    source: str = ""


@json_record
@dataclass(frozen=True)
class Header:
    """The conversion that a journal belongs to.

    Attributes:
        source: the source's fingerprint, taken from its headers.
        files: size and a hash of a sample of the content, for each file of the source on this machine
            (`engine.output.source_sample`).
        states: size, modification time and inode of each weight file among them.
    """

    fingerprint: str
    recipe: Mapping[str, Any]
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """An append-only file of finished units.

    Raises:
        LoftqError: from every method, if the file is a link, not a regular file, or far too large.
    """

    def __init__(self, path: Path) -> None:
        self._folder, self._name = ConfinedFolder(path.parent), path.name
        self._read: dict[str, int] = {}

    def read_header(self) -> Header | None:
        """Return the conversion that this journal belongs to, None if there is none yet."""
        return _header(self._content(self._name))

    def entries(self) -> dict[str, Entry]:
        """Return the finished units of all workers by tensor name."""
        unchecked = not _is_checked(self._content(self._name))
        contents = [self._content(name) for name in self._names()]
        return {entry.tensor: entry for content in contents for entry in _entries(content, unchecked)}

    def new_entries(self) -> list[Entry]:
        """Return the units that were added to any worker's file since the last call."""
        found: list[Entry] = []
        for name in self._names():
            content = self._content(name)[self._read.get(name, 0) :]
            whole = content[: content.rfind(b"\n") + 1]
            self._read[name] = self._read.get(name, 0) + len(whole)
            found += _entries(whole)
        return found

    def of_worker(self, name: str) -> Journal:
        """Return the journal that one worker writes; `entries` of this one includes it."""
        journal = Journal(self._folder.root / f"{self._name}.{name}")
        os.close(journal._open(os.O_WRONLY | os.O_CREAT))
        return journal

    def begin(self, header: Header) -> None:
        """Start a new journal."""
        self._folder.unlink(self._name)
        self._append(dataclasses.asdict(header))

    def add(self, *entries: Entry) -> None:
        """Record units; their bytes must be on disk."""
        self._append(*map(dataclasses.asdict, entries))

    def _append(self, *lines: Mapping[str, Any]) -> None:
        with os.fdopen(self._open(os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as handle:
            # End an incomplete last line first, so that this entry does not become part of it.
            handle.write(b"" if self._ends_with_newline() else b"\n")
            handle.write(b"".join(_line(values) + b"\n" for values in lines))
            handle.flush()
            os.fsync(handle.fileno())

    def _open(self, flags: int) -> int:
        return self._folder.open(self._name, flags | os.O_NONBLOCK)  # which a FIFO would otherwise make wait

    def _ends_with_newline(self) -> bool:
        with self._folder.read(self._name) as handle:
            if handle.seek(0, os.SEEK_END) == 0:
                return True
            handle.seek(-1, os.SEEK_END)
            return handle.read(1) == b"\n"

    def _names(self) -> list[str]:
        return sorted(path.name for path in self._folder.root.glob(f"{self._name}*"))

    def _content(self, name: str) -> bytes:
        try:
            with self._folder.read(name) as handle:
                if os.fstat(handle.fileno()).st_size > _MOST_BYTES:
                    raise LoftqError(
                        f"{self._folder.root / name} is larger than any journal: remove it, then run the same command "
                        "again to start from the beginning."
                    )
                return handle.read()
        except FileNotFoundError:
            return b""


def _line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=False).encode()
    return text[:-1] + f', "check": "{hashlib.sha256(text).hexdigest()}"}}'.encode()


def _verified(line: bytes) -> bytes | None:
    """Return a line without its hash; None if it has none, or one that is wrong."""
    found = _CHECKED_LINE.fullmatch(line)
    if found is None:
        return None
    text = found[1] + b"}"
    return text if hashlib.sha256(text).hexdigest().encode() == found[2] else None


def _header(content: bytes) -> Header | None:
    """Return the first line that is complete JSON, if it is a header; a line with a wrong hash is none."""
    for line in content.splitlines():
        try:
            return read_json(Header, _verified(line) or line)
        except InvalidRecord as error:
            if error.is_json:
                return None
    return None


def _is_checked(content: bytes) -> bool:
    """True if the journal's lines have hashes."""
    first = content.splitlines()[0] if content else b""
    return b', "check": "' in first


def _entries(content: bytes, unchecked: bool = False) -> Iterator[Entry]:
    """Yield the entries of a journal.

    Args:
        unchecked: also those of lines without a hash, as loftq 0.1 wrote them.
    """
    for line in content.split(b"\n"):
        verified = _verified(line)
        if verified is None and (not unchecked or _CHECKED_LINE.fullmatch(line)):
            continue
        with suppress(InvalidRecord):  # the header, or a damaged line
            yield read_json(Entry, line if verified is None else verified)


def hash_tensor(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the sha256 of every tensor's bytes."""
    return {name: hash_tensor(tensor) for name, tensor in tensors.items()}
