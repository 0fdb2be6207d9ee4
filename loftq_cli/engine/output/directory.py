"""The output directory of a conversion or a merge: claiming it, writing its files, publishing them.

During a run, everything is in `.loftq/`. `config.json` is the last file to appear, so that no loader mistakes half a
model for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.checkpoint import SideFile
from loftq_cli.engine.output.journal import Journal
from loftq_cli.engine.output.lock import Lock, take
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.tensorfile.hashing import FileRecord, check_file, hash_file
from loftq_cli.tensorfile.tensors import TensorFile
from loftq_cli.tensorfile.writer import ShardWriter

STATE = ".loftq"
_PARTIAL = f"{STATE}/partial"
_PUBLISHING = f"{STATE}/publishing"  # exists once files are being moved to their final places
PUSH_STATE = "push.json"  # in `.loftq`: pull requests that pushes have opened
# What conversions, merges and pushes keep in the state's folder, without locks.
_STATE_NAME = re.compile(
    r"journal(\..*)?|partial|publishing|run-.+|draft-.+|worker\.\d+\.log|merge(\.draft)?|push\.json"
)
_PIECE = 1 << 20  # bytes of a side file that are in memory at a time
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def partial_folder(output: Path) -> Path:
    """Return the folder that holds files until they are complete."""
    return output / _PARTIAL


def journal_of(output: Path) -> Journal:
    """Return the journal of an unfinished conversion."""
    return Journal(output / STATE / "journal")


@contextmanager
def claim(output: Path, inputs: Mapping[str, Path], prepare: Callable[[], None]) -> Iterator[Lock]:
    """Hold the lock of an output directory while the `with` block runs.

    Args:
        inputs: directories that are read, by the name to use in a message; the output must not overlap with them.
        prepare: called with the lock held, to inspect the directory and prepare it for writing.

    Raises:
        UsageError: the output overlaps with an input, is a file, or is being written by another run; and whatever
            `prepare` raises.
        LoftqError: the directory cannot be written.
    """
    check_place(output, inputs)
    lock = _lock(output, prepare)
    try:
        yield lock
    finally:
        _abandon(output, lock)


def check_place(output: Path, inputs: Mapping[str, Path]) -> None:
    """Check that the output can be a directory of its own.

    Args:
        inputs: directories that are read, by the name to use in a message.

    Raises:
        UsageError: it overlaps with an input, or is a file.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file: choose another -o.")
    for name, path in inputs.items():
        if output == path or path in output.parents or output in path.parents:
            raise UsageError(f"the output {output} and {name} {path} overlap: choose another -o.")


def _lock(output: Path, prepare: Callable[[], None]) -> Lock:
    try:
        output.mkdir(parents=True, exist_ok=True)
        state = ConfinedFolder(output).path(STATE)
        state.mkdir(exist_ok=True)
        lock = take(state)
        try:
            prepare()
        except BaseException:
            _abandon(output, lock)
            raise
        return lock
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise LoftqError(f"the output {output} cannot be written ({error.strerror}): choose another -o.") from error


def _abandon(output: Path, lock: Lock) -> None:
    """Release the lock, and remove the state's folder if nothing else is in it."""
    lock.release()
    with contextlib.suppress(OSError):
        (output / STATE).rmdir()


def clear_state(output: Path, keep: str = "") -> None:
    """Remove the state except for the lock, the file `keep` and what loftq does not put there.

    The journal goes first, because the rest is useless without it.
    """
    folder = ConfinedFolder(output)
    state = folder.path(STATE)
    for path in sorted(state.iterdir(), key=lambda path: not path.name.startswith("journal")):
        if _STATE_NAME.fullmatch(path.name) is None or path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            folder.remove_tree(f"{STATE}/{path.name}")
        else:
            folder.unlink(f"{STATE}/{path.name}")


def remove_files(output: Path, names: Iterable[str]) -> None:
    """Remove published files: `config.json` first, so that the directory no longer looks like a model, and the manifest
    last, because it shows that the others are ours."""
    for name in sorted(names, key=lambda name: (name != "config.json", name == MANIFEST, name)):
        ConfinedFolder(output).unlink(name)


def locate(output: Path, name: str) -> Path:
    """Return the path of a planned file: in `.loftq/partial`, or its final place if a run stopped between two moves.

    Raises:
        LoftqError: a link is on the way.
    """
    folder = ConfinedFolder(output)
    partial = folder.path(f"{_PARTIAL}/{name}")
    return partial if partial.exists() or not is_publishing(output) or not folder.exists(name) else folder.path(name)


def is_publishing(output: Path) -> bool:
    """True if an earlier run has begun to move finished files to their final places."""
    return ConfinedFolder(output).exists(_PUBLISHING)


@contextmanager
def open_writer(output: Path, files: tuple[TensorFile, ...], *, create: bool = False) -> Iterator[ShardWriter]:
    """Open the weight files of an output for writing.

    Args:
        create: create the files that are missing and write their headers, instead of expecting all to be there.
    """
    writer = ShardWriter(lambda name: locate(output, name), files)
    try:
        if create:
            writer.prepare()
        else:
            writer.open()
        yield writer
    finally:
        writer.close()


def read_back(output: Path, files: Iterable[TensorFile], hashes: Mapping[str, str]) -> dict[str, FileRecord]:
    """Read the weight files back from the disk and return size and sha256 of each by name.

    Args:
        hashes: sha256 of every tensor that was written.

    Raises:
        LoftqError: a file differs from what was written (exit code 4).
    """
    records = {}
    for file in files:
        path = locate(output, file.name)
        records[file.name], damaged = check_file(path, file, hashes)
        if damaged:
            raise LoftqError(
                f"{path} does not hold what was written to it ({damaged[0]} differs): check the disk, then run the "
                "same command again to repeat that part.",
                exit_code=ExitCode.INCOMPLETE,
            )
    return records


def write_files(output: Path, texts: Mapping[str, bytes], side_files: Iterable[SideFile] = ()) -> dict[str, FileRecord]:
    """Write small files to `.loftq/partial` and return size and sha256 of each by name.

    Raises:
        OSError: a file does not read back as it was written.
    """
    records = {name: write_file(output, name, content) for name, content in texts.items()}
    for side in side_files:
        with side.open() as content:
            records[side.name] = write_file(output, side.name, content)
    return records


def write_file(output: Path, name: str, content: bytes | BinaryIO) -> FileRecord:
    """Write one small file to `.loftq/partial`, flush it and read it back.

    Raises:
        OSError: it does not read back as it was written.
    """
    folder = ConfinedFolder(output)
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    digest, size = hashlib.sha256(), 0
    with folder.write(f"{_PARTIAL}/{name}") as handle:
        while piece := source.read(_PIECE):
            handle.write(piece)
            digest.update(piece)
            size += len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    record = FileRecord(size, digest.hexdigest())
    path = folder.path(f"{_PARTIAL}/{name}")
    if hash_file(path) != record:
        raise OSError(errno.EIO, "it does not read back as it was written", str(path))
    return record


def publish(output: Path, names: Iterable[str]) -> None:
    """Move complete files to their final places, `config.json` last, and remove the state but for the lock."""
    folder = ConfinedFolder(output)
    folder.write(_PUBLISHING).close()
    _sync_folder(folder.path(STATE))
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        if folder.exists(f"{_PARTIAL}/{name}"):
            folder.replace(f"{_PARTIAL}/{name}", name)
            _sync_folder(folder.path(name).parent)
    clear_state(output)
    _sync_folder(output)


def check_unchanged(output: Path, records: Mapping[str, FileRecord]) -> None:
    """Check that small files still are what `write_files` wrote.

    Raises:
        LoftqError: one has changed (exit code 4).
    """
    for name, record in records.items():
        path = locate(output, name)
        if not path.is_file() or hash_file(path) != record:
            raise LoftqError(
                f"{path} does not hold what was written to it: check the disk, then run the same command again to "
                "repeat that part.",
                exit_code=ExitCode.INCOMPLETE,
            )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def on_full_disk(output: Path) -> Iterator[None]:
    """Turn a disk error into a one-sentence message.

    Raises:
        LoftqError: the disk is full or failing (exit code 4).
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise LoftqError(
            f"writing to {output} failed ({error.strerror}): make room, then run the same command again.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error


@contextmanager
def on_file_error() -> Iterator[None]:
    """Turn any other error about a file into a one-sentence message.

    Raises:
        LoftqError: a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, (str, os.PathLike)):
            raise
        raise LoftqError(
            f"{error.filename} cannot be used ({error.strerror}): check it and its permissions, then run the same "
            "command again."
        ) from error
