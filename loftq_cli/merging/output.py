"""What a merge may do with the contents of its output directory.

A merge is not resumable: it starts again from the beginning. While one is unfinished, a mark in `.loftq` names the
files that it began to remove. Others can be its own only once it has begun to move files to their final places.

Only what is certainly a merge's is removed: files with names that a merge alone gives, and copies of the model's files
whose content is as recorded, or as the new merge will write it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loftq_cli.artifacts.manifest import MERGE_MARK
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.checkpoint import SideFile
from loftq_cli.engine.output.directory import STATE, clear_state, is_publishing, journal_of, partial_folder
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.merging.texts import CARD, FILES, RECORD
from loftq_cli.planning.output_files import INDEX

_TEXTS = frozenset({"config.json", RECORD, CARD, INDEX, MANIFEST})
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.(safetensors|gguf)")
_LONGEST_JSON = 100_000_000
_PIECE = 1 << 20


def start_merge(output: Path, names: Collection[str], overwrite: bool, side_files: Iterable[SideFile] = ()) -> None:
    """Make the directory ready for a merge. To be called with the output's lock held.

    Args:
        names: all files that the merge will write.
        side_files: those among them that are copied.

    Raises:
        UsageError: the directory holds an unfinished conversion, foreign files, or a finished merge that is not to be
            replaced.
        LoftqError: the directory's state is a link.
    """
    if not overwrite and journal_of(output).read_header() is not None:
        raise UsageError(
            f"{output} holds an unfinished conversion: finish it with the same `loftq quantize` command, choose "
            "another -o, or give --overwrite to drop it."
        )
    folder = ConfinedFolder(output)
    found = sorted(_files(output))
    proof = Proof(folder, frozenset(names), {side.name: side for side in side_files}, _recorded(folder))
    _refuse_to_replace(proof, found, overwrite)
    _write_mark(folder, found)
    clear_state(output, keep=MERGE_MARK)
    _remove(folder, found)
    partial_folder(output).mkdir(parents=True)


@dataclass(frozen=True)
class Proof:
    """What shows that a file of the output is a merge's.

    Attributes:
        names: of the files that the new merge will write.
        copied: those among them that are copies of the model's files.
        recorded: sha256 of the copies in a finished merge, by name.
    """

    folder: ConfinedFolder
    names: frozenset[str]
    copied: Mapping[str, SideFile]
    recorded: Mapping[str, str]

    def holds_for(self, name: str) -> bool:
        """True if the file is certainly a merge's."""
        if not self.folder.exists(name):
            return False  # a link, which no merge makes
        if name in _TEXTS or _WEIGHTS.fullmatch(name) is not None:
            return True
        if name not in self.recorded and name not in self.copied:
            return False
        with self.folder.read(name) as file:
            found = _sha256(file)
        if self.recorded.get(name) == found:
            return True
        if name not in self.copied:
            return False
        with self.copied[name].open() as content:
            return _sha256(content) == found


def _files(output: Path) -> Iterator[str]:
    """Yield the files of the directory without its state, by their path inside it; links are not followed."""
    for place, folders, files in os.walk(output):
        here = Path(place)
        if here == output and STATE in folders:
            folders.remove(STATE)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            yield (here / name).relative_to(output).as_posix()


def _refuse_to_replace(proof: Proof, found: list[str], overwrite: bool) -> None:
    if not found:
        return
    folder = proof.folder
    left = _left_by_unfinished_merge(folder)
    begun = proof.names if is_publishing(folder.root) else frozenset()
    unfinished = all(name in left or name.partition("/")[0] in left or name in begun for name in found)
    if not unfinished and RECORD not in found:
        raise UsageError(f"{folder.root} is not empty: choose another -o.")
    foreign = next((name for name in found if not proof.holds_for(name)), None)
    if foreign is not None:
        raise UsageError(
            f"{folder.root} is not empty: choose another -o, or move {foreign!r:.200} away, which is not known to be "
            "from a merge."
        )
    if not unfinished and not overwrite:
        raise UsageError(f"{folder.root} is not empty: give --overwrite to replace it.")


def _left_by_unfinished_merge(folder: ConfinedFolder) -> set[str]:
    names = _json_of(folder, f"{STATE}/{MERGE_MARK}")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _recorded(folder: ConfinedFolder) -> dict[str, str]:
    """Return the sha256 of each file that the record of a finished merge names."""
    record = _json_of(folder, RECORD)
    files = record.get(FILES) if isinstance(record, dict) else None
    if not isinstance(files, dict):
        return {}
    return {name: str(item.get("sha256")) for name, item in files.items() if isinstance(item, dict)}


def _json_of(folder: ConfinedFolder, name: str) -> object:
    try:
        with folder.read(name) as file:
            return json.loads(file.read(_LONGEST_JSON))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _write_mark(folder: ConfinedFolder, names: Collection[str]) -> None:
    mark = f"{STATE}/{MERGE_MARK}"
    with folder.write(f"{mark}.draft") as file:
        file.write(json.dumps(sorted(names)).encode())
        file.flush()
        os.fsync(file.fileno())
    folder.replace(f"{mark}.draft", mark)


def _remove(folder: ConfinedFolder, names: Collection[str]) -> None:
    """Remove files, `config.json` first: from then on the directory no longer looks like a model. The record goes last,
    because it shows that others are ours."""
    for name in sorted(names, key=lambda name: (name != "config.json", name == RECORD, name)):
        folder.unlink(name)
    for name in sorted({name.rpartition("/")[0] for name in names} - {""}, reverse=True):
        with contextlib.suppress(OSError, LoftqError):  # a folder that is not empty stays
            folder.path(name).rmdir()
