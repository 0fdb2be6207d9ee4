"""What a merge may do with the contents of its output directory.

A merge is not resumable: it starts again from the beginning. While one is unfinished, a mark in `.loftq` names the
entries that it may have left in the directory, so that repeating the command can remove them and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from loftq_cli.artifacts.manifest import MERGE_MARK
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.engine.output.directory import STATE, clear_state, journal_of, partial_folder
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.merging.texts import CARD, RECORD
from loftq_cli.planning.output_files import INDEX

_TEXTS = frozenset({"config.json", RECORD, CARD, INDEX, MANIFEST})
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.(safetensors|gguf)")
_LONGEST_MARK = 10_000_000


def start_merge(output: Path, names: Collection[str], overwrite: bool) -> None:
    """Make the directory ready for a merge. To be called with the output's lock held.

    Args:
        names: all files that the merge will write.

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
    _refuse_to_replace(folder, found, names, overwrite)
    tops = {name.partition("/")[0] for name in (*found, *names)}
    _write_mark(folder, tops)
    clear_state(output, keep=MERGE_MARK)
    _remove(folder, found)
    partial_folder(output).mkdir(parents=True)


def _files(output: Path) -> Iterator[str]:
    """Yield the files of the directory without its state, by their path inside it; links are not followed."""
    for place, folders, files in os.walk(output):
        here = Path(place)
        if here == output and STATE in folders:
            folders.remove(STATE)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            yield (here / name).relative_to(output).as_posix()


def _refuse_to_replace(folder: ConfinedFolder, found: list[str], names: Collection[str], overwrite: bool) -> None:
    if not found:
        return
    marked = _left_by_unfinished_merge(folder)
    unfinished = all(name.partition("/")[0] in marked for name in found)
    if not unfinished and RECORD not in found:
        raise UsageError(f"{folder.root} is not empty: choose another -o.")
    foreign = next((name for name in found if not _may_be_ours(name, names)), None)
    if foreign is not None:
        raise UsageError(
            f"{folder.root} is not empty: choose another -o, or move {foreign!r:.200} away, which is not known to be "
            "from a merge."
        )
    if not unfinished and not overwrite:
        raise UsageError(f"{folder.root} is not empty: give --overwrite to replace it.")


def _may_be_ours(name: str, names: Collection[str]) -> bool:
    return name in names or name in _TEXTS or _WEIGHTS.fullmatch(name) is not None


def _left_by_unfinished_merge(folder: ConfinedFolder) -> set[str]:
    try:
        with folder.read(f"{STATE}/{MERGE_MARK}") as file:
            names = json.loads(file.read(_LONGEST_MARK))
    except (FileNotFoundError, ValueError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _write_mark(folder: ConfinedFolder, names: Collection[str]) -> None:
    mark = f"{STATE}/{MERGE_MARK}"
    with folder.write(f"{mark}.draft") as file:
        file.write(json.dumps(sorted(names)).encode())
        file.flush()
        os.fsync(file.fileno())
    folder.replace(f"{mark}.draft", mark)


def _remove(folder: ConfinedFolder, names: Collection[str]) -> None:
    """Remove files, `config.json` first: from then on the directory no longer looks like a model."""
    for name in sorted(names, key=lambda name: (name != "config.json", name)):
        folder.unlink(name)
    for name in sorted({name.rpartition("/")[0] for name in names} - {""}, reverse=True):
        with contextlib.suppress(OSError, LoftqError):  # a folder that is not empty stays
            folder.path(name).rmdir()
