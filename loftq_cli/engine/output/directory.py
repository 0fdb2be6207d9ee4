"""The output directory: who may write there, how a conversion goes on in it, and how it becomes complete.

While work is under way everything lies in `.loftq/`; `config.json` is the last file to appear, so that no loader takes
half a model for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import read_manifest
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.output.journal import Header, Journal
from loftq_cli.engine.output.lock import Lock, is_lock, take
from loftq_cli.engine.output.source_sample import changed_files, sample_source
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.planning.plan import Plan
from loftq_cli.tensorfile.hashing import FileRecord, hash_file

STATE = ".loftq"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}
_LONG_LIST = 6


def partial_folder(output: Path) -> Path:
    """Where files lie until they are complete."""
    return output / STATE / "partial"


def journal_of(output: Path) -> Journal:
    """The journal of an unfinished conversion."""
    return Journal(output / STATE / "journal")


def claim(plan: Plan, checkpoint: Checkpoint, overwrite: bool) -> Lock:
    """Make the output directory ours, or find that it is already and holds finished units of the same conversion.

    Returns:
        The lock that keeps other runs out; it is the caller's to release.

    Raises:
        UsageError: it is the source, a file, somebody else's, finished, being written by another run, or the state of
            another conversion or of a source that has changed since.
        LoftqError: it cannot be written.
    """
    output = plan.output
    if output == plan.source or plan.source in output.parents or output in plan.source.parents:
        raise UsageError(f"the output {output} and the model {plan.source} overlap: choose another -o.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file: choose another -o.")
    try:
        (output / STATE).mkdir(parents=True, exist_ok=True)
        lock = take(output / STATE)
        try:
            _take_over(plan, checkpoint, overwrite)
        except BaseException:
            abandon(output, lock)
            raise
        return lock
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise LoftqError(f"the output {output} cannot be written ({error.strerror}): choose another -o.") from error


def abandon(output: Path, lock: Lock) -> None:
    """Give the lock back, and the state's folder where it holds nothing else."""
    lock.release()
    with contextlib.suppress(OSError):
        (output / STATE).rmdir()


def _take_over(plan: Plan, checkpoint: Checkpoint, overwrite: bool) -> None:
    """Go on with the state there is, or begin a new one."""
    output, files = plan.output, sample_source(checkpoint)
    header = journal_of(output).read_header()
    same = header is not None and header.fingerprint == plan.fingerprint and _same_commit(header.recipe, plan)
    if same and header is not None and not changed_files(header.files, files):
        return
    if header is not None:
        if not overwrite:
            raise UsageError(_why_not_resumed(header, plan, checkpoint, files))
    elif (output / MANIFEST).exists():
        _replace_finished(plan, overwrite)
    elif any(path.name != STATE for path in output.iterdir()):
        raise UsageError(f"{output} holds files that are not loftq's: choose another -o or an empty directory.")
    _clear_state(output)
    partial_folder(output).mkdir(parents=True, exist_ok=True)
    journal_of(output).begin(Header(plan.fingerprint, plan.recipe.as_dict(), checkpoint.fingerprint, files))


def _why_not_resumed(header: Header, plan: Plan, checkpoint: Checkpoint, files: Mapping[str, str]) -> str:
    output, different = plan.output, _difference(header.recipe, plan)
    if different:
        return (
            f"{output} holds an unfinished conversion with {different}: repeat that command to finish it, choose "
            "another -o, or give --overwrite to drop it."
        )
    changed = changed_files(header.files, files)
    if changed:
        what = f"{plan.source / changed[0]} is not the file"
    elif header.source != checkpoint.fingerprint:
        what = f"the config or the tensors' names, types or shapes in {plan.source} are not those"
    else:
        what = "this version of loftq is not the one"
    return (
        f"{what} that the unfinished conversion in {output} began with: put that one back to go on, or give "
        "--overwrite to start again."
    )


def _clear_state(output: Path) -> None:
    """Everything of the state but the lock; the journal goes first, so that what is left means nothing."""
    for path in sorted((output / STATE).iterdir(), key=lambda path: not path.name.startswith("journal")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not is_lock(path):
            path.unlink(missing_ok=True)


def _same_commit(recipe: Mapping[str, Any], plan: Plan) -> bool:
    """Another commit may hold other weights under the same names."""
    return recipe.get("revision") == plan.recipe.revision


def _replace_finished(plan: Plan, overwrite: bool) -> None:
    manifest = read_manifest(plan.output)
    if not overwrite:
        if manifest.fingerprint == plan.fingerprint:
            raise UsageError(f"{plan.output} is finished already, with the same recipe: give --overwrite to repeat it.")
        different = _difference(manifest.recipe, plan) or "another source"
        raise UsageError(
            f"{plan.output} holds a finished conversion with {different}: choose another -o, or give --overwrite to "
            "replace it."
        )
    # config.json goes first: from then on the directory no longer looks like a model.
    for name in ["config.json", *manifest.files, MANIFEST]:
        (plan.output / name).unlink(missing_ok=True)


def _difference(recipe: Mapping[str, Any], plan: Plan) -> str:
    """`bits 4 (now 2), rank 16 (now 64)`: what another conversion was asked that this one is not."""
    now = plan.recipe.as_dict()
    fields = [name for name in now if name != "model" and recipe.get(name) != now[name]]
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


def write_file(output: Path, name: str, content: bytes) -> FileRecord:
    """Put a small file into `.loftq/partial`, flush it and read it back.

    Raises:
        OSError: it does not read back as it was written.
    """
    path = partial_folder(output) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    if hash_file(path) != record:
        raise OSError(errno.EIO, "it does not read back as it was written", str(path))
    return record








def publish(output: Path, names: list[str]) -> None:
    """Move complete files to their places, `config.json` last, and drop the state but for the lock."""
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        partial = partial_folder(output) / name
        if partial.exists():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, output / name)
            _sync_folder((output / name).parent)
    _clear_state(output)
    _sync_folder(output)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def on_full_disk(output: Path) -> Iterator[None]:
    """
    Raises:
        LoftqError: for an error of the disk, with exit code 4.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise LoftqError(
            f"writing to {output} failed ({error.strerror}): make room, then run the same command again to go on.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error
