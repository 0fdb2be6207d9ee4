"""What a merge may do with the contents of its output directory.

A merge is not resumable: it starts again from the beginning. While one is unfinished, a mark in `.loftq` names the
entries that it may have left in the directory, so that repeating the command can remove them and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from loftq_cli.artifacts.manifest import MERGE_MARK
from loftq_cli.engine.output.directory import STATE, clear_state, journal_of, partial_folder
from loftq_cli.errors import UsageError
from loftq_cli.merging.texts import RECORD


def start_merge(output: Path, names: Collection[str], overwrite: bool) -> None:
    """Make the directory ready for a merge. To be called with the output's lock held.

    Args:
        names: all files that the merge will write.

    Raises:
        UsageError: the directory holds an unfinished conversion, foreign files, or a finished merge that is not to be
            replaced.
    """
    if not overwrite and journal_of(output).read_header() is not None:
        raise UsageError(
            f"{output} holds an unfinished conversion: finish it with the same `loftq quantize` command, choose "
            "another -o, or give --overwrite to drop it."
        )
    found = {path.name for path in output.iterdir()} - {STATE}
    _refuse_to_replace(output, found, overwrite)
    _write_mark(output, found | {Path(name).parts[0] for name in names})
    clear_state(output, keep=MERGE_MARK)
    _remove(output, found)
    partial_folder(output).mkdir(parents=True)


def _refuse_to_replace(output: Path, found: set[str], overwrite: bool) -> None:
    if not found - _left_by_unfinished_merge(output):
        return
    if RECORD not in found:
        raise UsageError(f"{output} is not empty: choose another -o.")
    if not overwrite:
        raise UsageError(f"{output} is not empty: give --overwrite to replace it.")


def _left_by_unfinished_merge(output: Path) -> set[str]:
    try:
        return set(json.loads((output / STATE / MERGE_MARK).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def _write_mark(output: Path, names: Collection[str]) -> None:
    mark = output / STATE / MERGE_MARK
    draft = mark.with_name(f"{MERGE_MARK}.draft")
    with open(draft, "w") as handle:
        json.dump(sorted(names), handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(draft, mark)


def _remove(output: Path, names: Collection[str]) -> None:
    """Remove entries of the directory, `config.json` first: from then on it no longer looks like a model."""
    for name in sorted(names, key=lambda name: (name != "config.json", name)):
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
