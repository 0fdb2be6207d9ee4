"""The output directory: who may write there, how a conversion goes on in it, and how it becomes complete.

While work is under way everything lies in `.loftq/`; `config.json` is the last file to appear, so that no loader takes
half a model for a whole one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import FileRecord, read_manifest
from loftq_cli.engine.journal import Header, Journal
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.planner import Plan

STATE = ".loftq"
_CHUNK = 8 << 20
_LONG_LIST = 6


def partial_folder(output: Path) -> Path:
    """Where files lie until they are complete."""
    return output / STATE / "partial"


def journal_of(output: Path) -> Journal:
    """The journal of an unfinished conversion."""
    return Journal(output / STATE / "journal")


def claim(plan: Plan, overwrite: bool) -> None:
    """Make the output directory ours, or find that it is already and holds finished units of the same conversion.

    Raises:
        UsageError: it is the source, a file, somebody else's, finished, or the state of another conversion.
        LoftqError: it cannot be written.
    """
    output = plan.output
    if output == plan.source or plan.source in output.parents or output in plan.source.parents:
        raise UsageError(f"the output {output} and the model {plan.source} overlap: choose another -o.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file: choose another -o.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        _take_over(plan, overwrite)
        if journal_of(output).read_header() is None:
            partial_folder(output).mkdir(parents=True, exist_ok=True)
            journal_of(output).begin(Header(plan.fingerprint, plan.recipe.as_dict()))
    except OSError as error:
        raise LoftqError(f"the output {output} cannot be written ({error.strerror}): choose another -o.") from error


def _take_over(plan: Plan, overwrite: bool) -> None:
    output = plan.output
    header = journal_of(output).read_header()
    if header is not None and header.fingerprint == plan.fingerprint and _same_commit(header.recipe, plan):
        return
    if (output / MANIFEST).exists() and header is None:
        _replace_finished(plan, overwrite)
    elif header is not None and not overwrite:
        raise UsageError(
            f"{output} holds an unfinished conversion with {_difference(header.recipe, plan)}: repeat that command to "
            "finish it, choose another -o, or give --overwrite to drop it."
        )
    elif header is None and any(path.name != STATE for path in output.iterdir()):
        raise UsageError(f"{output} holds files that are not loftq's: choose another -o or an empty directory.")
    shutil.rmtree(output / STATE, ignore_errors=True)


def _same_commit(recipe: Mapping[str, Any], plan: Plan) -> bool:
    """Another commit may hold other weights under the same names."""
    return recipe.get("revision") == plan.recipe.revision


def _replace_finished(plan: Plan, overwrite: bool) -> None:
    manifest = read_manifest(plan.output)
    if not overwrite:
        if manifest.fingerprint == plan.fingerprint:
            raise UsageError(f"{plan.output} is finished already, with the same recipe: give --overwrite to repeat it.")
        raise UsageError(
            f"{plan.output} holds a finished conversion with {_difference(manifest.recipe, plan)}: choose another -o, "
            "or give --overwrite to replace it."
        )
    # config.json goes first: from then on the directory no longer looks like a model.
    for name in ["config.json", *manifest.files, MANIFEST]:
        (plan.output / name).unlink(missing_ok=True)


def _difference(recipe: Mapping[str, Any], plan: Plan) -> str:
    """`bits 4 (now 2), rank 16 (now 64)`: what another conversion was asked that this one is not."""
    now = plan.recipe.as_dict()
    fields = [name for name in now if name != "model" and recipe.get(name) != now[name]]
    if not fields:
        return "another source or loftq version"
    return ", ".join(
        f"{name.replace('_', '-')} {_short(recipe.get(name))} (now {_short(now[name])})" for name in fields
    )


def _short(value: object) -> str:
    """Allocated bits are a rule for every matrix, too many for a sentence."""
    return f"{len(value)} rules" if isinstance(value, list) and len(value) > _LONG_LIST else str(value)


def locate(output: Path, name: str) -> Path:
    """A planned file: in `.loftq/partial`, or already at its final place if a stop came between renames."""
    partial = partial_folder(output) / name
    return partial if partial.exists() or not (output / name).exists() else output / name


def write_file(output: Path, name: str, content: bytes) -> None:
    """Put a small file into `.loftq/partial` and flush it."""
    path = partial_folder(output) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def hash_file(path: Path) -> FileRecord:
    """Size and sha256, read back in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def publish(output: Path, names: list[str]) -> None:
    """Move complete files to their places, `config.json` last, and drop the state."""
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        partial = partial_folder(output) / name
        if partial.exists():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, output / name)
            _sync_folder((output / name).parent)
    shutil.rmtree(output / STATE)
    _sync_folder(output)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
