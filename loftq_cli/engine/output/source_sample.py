"""Check that a source is still the one a conversion began with.

The plan's fingerprint covers names, types, shapes, config and the Hub's commit, but not the contents of a directory's
files. So the journal keeps, for every file, its size and a sha256 of its first bytes (the header) and of blocks spread
over the rest: weights that were trained further or replaced differ in all of them. Times do not count, so a copy is
as good as the original. What the sample misses is found by the hashes of the source tensors in the journal: they are
compared with the files again if a file's size, modification time or inode has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.output.journal import Entry, hash_tensor
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter

_START = 1 << 20
_BLOCK, _BLOCKS = 4 << 10, 256


def sample_source(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the size and sample of every weight and side file on this machine, by name."""
    names = {info.file for info in checkpoint.tensors.values()} | {side.name for side in checkpoint.side_files()}
    paths = {name: checkpoint.path / name for name in sorted(names)}
    return {name: sample_file(path) for name, path in paths.items() if path.is_file()}


def file_states(checkpoint: Checkpoint) -> dict[str, str]:
    """Return size, modification time in nanoseconds and inode of every weight file on this machine, by name."""
    paths = {name: checkpoint.path / name for name in sorted({info.file for info in checkpoint.tensors.values()})}
    stats = {name: path.stat() for name, path in paths.items() if path.is_file()}
    return {name: f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}" for name, stat in stats.items()}


def replaced_unit(
    units: Iterable[Unit], entries: Mapping[str, Entry], checkpoint: Checkpoint, reporter: Reporter
) -> Unit | None:
    """Return the first finished unit whose source tensor is not the one that was converted. Reads all of them.

    Units whose source was not hashed, by loftq 0.1, are skipped.
    """
    finished = [unit for unit in units if unit.tensor in entries and entries[unit.tensor].source]
    ordered = sorted(finished, key=lambda unit: (unit.source.file, unit.source.start))
    for done, unit in enumerate(ordered):
        reporter.comparing(done, len(ordered))
        if hash_tensor(unit.read(checkpoint)) != entries[unit.tensor].source:
            return unit
    return None


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the files whose content differs; a file in only one of them may have come in another container."""
    return [name for name in before if name in now and before[name] != now[name]]


def sample_file(path: Path) -> str:
    """Return `SIZE-SHA256` of the start and of evenly spread blocks."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    handle = os.open(path, os.O_RDONLY)
    try:
        digest.update(os.pread(handle, _START, 0))
        for block in range(_BLOCKS if size > _START else 0):
            position = _START + (size - _START) * block // _BLOCKS
            digest.update(os.pread(handle, _BLOCK, position))
    finally:
        os.close(handle)
    return f"{size}-{digest.hexdigest()}"
