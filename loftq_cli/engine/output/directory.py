"""The output directory of a conversion or a merge: claiming it, writing its files, publishing them.

While work is under way everything lies in `.loftq/`. `config.json` is the last file to appear, so that no loader
mistakes half a model for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loftq_cli.checkpoint import SideFile
from loftq_cli.engine.output.journal import Journal
from loftq_cli.engine.output.lock import Lock, is_lock, take
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.tensorfile.hashing import FileRecord, check_file, hash_file
from loftq_cli.tensorfile.tensors import TensorFile
from loftq_cli.tensorfile.writer import ShardWriter

STATE = ".loftq"
_PIECE = 1 << 20  # bytes of a side file that are in memory at a time
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def partial_folder(output: Path) -> Path:
    """Return the folder that holds files until they are complete."""
    return output / STATE / "partial"


def journal_of(output: Path) -> Journal:
    """Return the journal of an unfinished conversion."""
    return Journal(output / STATE / "journal")


@contextmanager
def claim(output: Path, inputs: Mapping[str, Path], prepare: Callable[[], None]) -> Iterator[Lock]:
    """Hold the lock of an output directory while the `with` block runs.

    Args:
        inputs: directories that are read, by what to call them in a message; the output must not overlap with them.
        prepare: called with the lock held, to inspect what is in the directory and make it ready for writing.

    Raises:
        UsageError: the output overlaps with an input, is a file, or is being written by another run; and whatever
            `prepare` raises.
        LoftqError: the directory cannot be written.
    """
    _refuse_overlap(output, inputs)
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {output} is a file: choose another -o.")
    lock = _lock(output, prepare)
    try:
        yield lock
    finally:
        _abandon(output, lock)


def _refuse_overlap(output: Path, inputs: Mapping[str, Path]) -> None:
    for name, path in inputs.items():
        if output == path or path in output.parents or output in path.parents:
            raise UsageError(f"the output {output} and {name} {path} overlap: choose another -o.")


def _lock(output: Path, prepare: Callable[[], None]) -> Lock:
    try:
        (output / STATE).mkdir(parents=True, exist_ok=True)
        lock = take(output / STATE)
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
    """Remove everything of the state but the lock and the file `keep`; the journal first, because the rest means
    nothing without it."""
    for path in sorted((output / STATE).iterdir(), key=lambda path: not path.name.startswith("journal")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != keep and not is_lock(path):
            path.unlink(missing_ok=True)


def remove_files(output: Path, names: Iterable[str]) -> None:
    """Remove published files, `config.json` first: from then on the directory no longer looks like a model."""
    for name in sorted(names, key=lambda name: (name != "config.json", name)):
        (output / name).unlink(missing_ok=True)


def locate(output: Path, name: str) -> Path:
    """Return the path of a planned file: in `.loftq/partial`, or its final place if a run stopped between two moves."""
    partial = partial_folder(output) / name
    return partial if partial.exists() or not (output / name).exists() else output / name


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
    path = partial_folder(output) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as handle:
        while piece := source.read(_PIECE):
            handle.write(piece)
            digest.update(piece)
            size += len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    record = FileRecord(size, digest.hexdigest())
    if hash_file(path) != record:
        raise OSError(errno.EIO, "it does not read back as it was written", str(path))
    return record


def publish(output: Path, names: Iterable[str]) -> None:
    """Move complete files to their final places, `config.json` last, and remove the state but for the lock."""
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        partial = partial_folder(output) / name
        if partial.exists():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, output / name)
            _sync_folder((output / name).parent)
    clear_state(output)
    _sync_folder(output)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def on_full_disk(output: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence.

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
