"""Verify that a finished directory is, to the last bit, what was written; with the source, also recompute the residual
of every matrix from the files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from loftq_cli.artifacts.manifest import (
    MOST_BYTES,
    NAME,
    KeptRecord,
    Manifest,
    MatrixRecord,
    is_sealed,
    parse_manifest,
    read_manifest,
    unfinished,
)
from loftq_cli.artifacts.origin import recipe_for
from loftq_cli.engine.output.directory import STATE
from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import user_path
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.regular_file import read_bounded
from loftq_cli.tensorfile.hashing import FileRecord, hash_file

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.checkpoint import Checkpoint

# The manifest keeps eight digits of a float32 computation whose order depends on the machine; at 8 bits the float32
# difference W - Q has fewer digits left.
RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 1e-7

_ADVICE = ("convert the model again", "download it again")

# Reading a tensor by a record that does not match the files raises these; a manifest can claim anything.
_MISFITS = (LoftqError, SafetensorError, KeyError, IndexError, ValueError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class Problem:
    """A difference: the file or tensor, and what is wrong with it."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


@dataclass(frozen=True)
class Step:
    """Progress: the file or tensor being checked, and the amount done so far, in bytes of files or in tensors."""

    name: str
    done: int
    total: int
    of_bytes: bool


@dataclass(frozen=True)
class Verification:
    """The number of checks and every difference that was found.

    Attributes:
        files, nbytes: files that were hashed, including the manifest itself.
        matrices, kept: quantized matrices whose residual was recomputed, and copied tensors that were compared; 0
            without a source.
        largest_deviation: |recomputed - recorded| / recorded of the residuals, at most RELATIVE_TOLERANCE if correct.
    """

    directory: str
    source: str | None
    files: int
    nbytes: int
    matrices: int
    kept: int
    largest_deviation: float
    seconds: float
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@full_precision()
def verify(
    directory: str | Path,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    stream: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> Verification:
    """Re-read and hash every file of a finished output; with `source`, recompute every residual from the files.

    The manifest must match its own digest, every file it lists must exist with the listed size and sha256, and there
    must be no other file (names that start with a dot, such as `.gitattributes`, are ignored). With `source`, every
    matrix is decoded by the container's own decoder, and ‖W - Q - BA‖ / ‖W‖ must agree with the manifest within
    RELATIVE_TOLERANCE; copied tensors must equal the source's, bit for bit. This keeps one matrix in memory at a time,
    and is skipped if any file is wrong.

    Args:
        directory: output of `quantize`.
        source: the checkpoint it was made from: a directory, or a model on the Hub as `org/name` or `org/name@revision`
            (by default at the recorded commit).
        stream: read a model on the Hub by range requests, without keeping a copy.
        progress: called before every file and tensor.

    Raises:
        LoftqError: there is no finished conversion, or the source cannot be read. Differences are returned, not raised.
    """
    started, path = time.perf_counter(), user_path(directory)
    report = progress or (lambda step: None)
    manifest, problems = _check_manifest(path)
    found = Verification(str(path), None, 0, 0, 0, 0, 0.0, 0.0, tuple(problems))
    if manifest is not None:
        found = _check_files(path, manifest, found, report)
    if manifest is not None and source is not None and found.ok:
        found = _check_source(path, manifest, found, str(source), revision, stream, report)
    return replace(found, seconds=round(time.perf_counter() - started, 3))


def _check_manifest(path: Path) -> tuple[Manifest | None, list[Problem]]:
    """Return the manifest, None if it cannot be read, and what is wrong with it."""
    if not (path / NAME).exists() and (path / "loftq.yaml").exists() and not (path / STATE).exists():
        return None, [Problem(NAME, "is missing, so the files cannot be checked")]
    if not (path / NAME).exists() or ((path / STATE).is_dir() and not (path / "config.json").exists()):
        read_manifest(path)
        raise unfinished(path)
    try:
        content = read_bounded(path / NAME, MOST_BYTES)
        sealed, manifest = is_sealed(content), parse_manifest(path / NAME, content)
    except OSError as error:
        return None, [Problem(NAME, f"cannot be read ({error.strerror})")]
    except LoftqError as error:
        return None, [Problem(NAME, _without_path(str(error), path / NAME))]
    return manifest, [] if sealed else [Problem(NAME, "is damaged: its content does not match its digest")]


def _without_path(message: str, path: Path) -> str:
    """Return an error about a file as a problem, which names the file itself and needs no advice."""
    what, _, advice = message.removeprefix(f"{path} ").removesuffix(".").rpartition(": ")
    return what if advice in _ADVICE else f"{what}: {advice}" if what else advice


def _check_files(path: Path, manifest: Manifest, found: Verification, report: Callable[[Step], None]) -> Verification:
    problems, hashed = [], 0
    total = sum(record.nbytes for record in manifest.files.values())
    for name, record in manifest.files.items():
        report(Step(name, hashed, total, of_bytes=True))
        problem = _check_file(path / name, record)
        problems += [] if problem is None else [Problem(name, problem)]
        hashed += record.nbytes
    report(Step("", total, total, of_bytes=True))
    known = {NAME, *manifest.files}
    problems += [Problem(name, "is not part of the conversion") for name in _present(path) if name not in known]
    size = total + (path / NAME).stat().st_size
    return replace(found, files=len(known), nbytes=size, problems=(*found.problems, *problems))


def _check_file(path: Path, record: FileRecord) -> str | None:
    """Return what is wrong with a file, or None."""
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != record.nbytes:
            return f"is {size} bytes long instead of {record.nbytes}"
        return None if hash_file(path).sha256 == record.sha256 else "is damaged: its sha256 differs"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _present(path: Path) -> list[str]:
    """Return all files, by their path inside the directory."""
    files = (found.relative_to(path) for found in path.rglob("*") if not found.is_dir())
    return sorted(file.as_posix() for file in files if not file.parts[0].startswith("."))


def _check_source(
    path: Path,
    manifest: Manifest,
    found: Verification,
    source: str,
    revision: str | None,
    stream: bool,
    report: Callable[[Step], None],
) -> Verification:
    """Compare the files with the source, one tensor at a time."""
    from loftq_cli.checkpoint import open_source

    asked = recipe_for(manifest, source, revision)
    with open_source(asked, stream=stream) as (checkpoint, resolved):
        found = replace(found, source=resolved.model)
        if checkpoint.fingerprint != manifest.source_fingerprint:
            what = "is not the model the conversion was made from: its config or its tensors' shapes differ"
            return replace(found, problems=(Problem(source, what),))
        records: tuple[MatrixRecord | KeptRecord, ...] = (*manifest.matrices, *manifest.kept)
        problems, largest = [], 0.0
        for done, record in enumerate(records):
            report(Step(record.tensor, done, len(records), of_bytes=False))
            difference, deviation = _compare(path, manifest, record, checkpoint)
            problems += [] if difference is None else [Problem(record.tensor, difference)]
            largest = max(largest, deviation)
        report(Step("", len(records), len(records), of_bytes=False))
    return replace(
        found,
        matrices=len(manifest.matrices),
        kept=len(manifest.kept),
        largest_deviation=float(f"{largest:.3g}"),
        problems=tuple(problems),
    )


def _compare(
    path: Path, manifest: Manifest, record: MatrixRecord | KeptRecord, checkpoint: Checkpoint
) -> tuple[str | None, float]:
    """Return how a record differs from the source, or None, and the relative deviation of its residual."""
    from loftq_cli.checkpoint.base import read_named

    try:
        original = read_named(checkpoint, record.tensor)
    except (KeyError, ValueError, IndexError):
        return "is not a tensor of the source", 0.0
    try:
        if isinstance(record, KeptRecord):
            return (None if _is_copied(path, record, original) else "differs from the source's tensor"), 0.0
        shape = tuple(original.shape[::-1] if record.orientation.transposed else original.shape)
        if shape != record.shape:
            return f"is {list(shape)} in the source, but {list(record.shape)} in the manifest", 0.0
        residual = recompute_residual(path, manifest, record, original)
    except _MISFITS as error:
        return f"cannot be read from the files as {NAME} describes it ({_first_line(error)})", 0.0
    deviation = _deviation(residual, record.residual)
    if not _agrees(residual, record.residual):
        return f"has a residual of {residual:.8g}, but {record.residual:.8g} in the manifest", deviation
    return None, deviation


def recompute_residual(path: Path, manifest: Manifest, record: MatrixRecord, weight: Tensor) -> float:
    """Return ‖W - Q - BA‖_F / ‖W‖_F of one matrix, with Q and BA read from the files.

    Args:
        weight: W, stored as in the source; it is overwritten.
    """
    from loftq_cli.artifacts.decode import decode_matrix, read_factors
    from loftq_cli.numerics.lowrank.truncate import frobenius

    error = record.orientation.turn(weight).float().contiguous()
    norm = frobenius(error)
    error -= decode_matrix(path, manifest, record)
    if record.rank:
        error.addmm_(*read_factors(path, manifest, record), alpha=-1)
    return frobenius(error) / norm if norm else 0.0


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _is_copied(path: Path, record: KeptRecord, original: Tensor) -> bool:
    from loftq_cli.artifacts.decode import read_tensor
    from loftq_cli.tensorfile.writer import tensor_bytes

    written = read_tensor(path, record.tensor)
    # Bytes, so that a NaN is equal to itself.
    return written.shape == original.shape and tensor_bytes(written) == tensor_bytes(original.to(written.dtype))


def _agrees(residual: float, recorded: float) -> bool:
    return abs(residual - recorded) <= max(RELATIVE_TOLERANCE * recorded, ABSOLUTE_TOLERANCE)


def _deviation(residual: float, recorded: float) -> float:
    return abs(residual - recorded) / recorded if recorded else 0.0
