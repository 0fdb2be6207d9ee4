"""Singular values of the error of a few matrices, from the written files and the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.errors import LoftqError

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.checkpoint import Checkpoint

_POINTS = 64
_LARGEST = 1 << 26  # numbers in a matrix whose decomposition takes seconds, not minutes


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix, relative to the largest of W, at the same `indices` (counted from 1).

    Attributes:
        weight: of W.
        backbone: of W - Q.
        error: of W - Q - BA; None without an adapter.
    """

    module: str
    rank: int
    indices: tuple[int, ...]
    weight: tuple[float, ...]
    backbone: tuple[float, ...]
    error: tuple[float, ...] | None


def choose_records(records: Sequence[MatrixRecord], count: int) -> tuple[MatrixRecord, ...]:
    """Return `count` matrices spread over the kept residuals, the largest residual first."""
    fitting = [record for record in records if record.shape[0] * record.shape[1] <= _LARGEST]
    ordered = sorted(fitting, key=lambda record: (-record.residual, record.module))
    if count >= len(ordered) or count <= 1:
        return tuple(ordered[: max(count, 0)])
    return tuple(ordered[step * (len(ordered) - 1) // (count - 1)] for step in range(count))


def measure_spectra(
    path: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    count: int,
    progress: Callable[[str], None],
) -> tuple[Spectrum, ...]:
    """Return the spectra of `count` matrices of a directory.

    Raises:
        LoftqError: the source does not have a matrix as the manifest describes it, or the files do not.
    """
    found = []
    for record in choose_records(manifest.matrices, count):
        progress(record.module)
        found.append(_spectrum(path, manifest, record, _original(checkpoint, record)))
    return tuple(found)


def _original(checkpoint: Checkpoint, record: MatrixRecord) -> Tensor:
    """Return W of a record, float32 [out, in]."""
    from loftq_cli.checkpoint.base import read_named

    try:
        stored = read_named(checkpoint, record.tensor)
    except (KeyError, ValueError, IndexError):
        raise LoftqError(f"{record.tensor} is not a tensor of the source: give the right one with --source.") from None
    weight = record.orientation.turn(stored).float()
    if tuple(weight.shape) != record.shape:
        raise LoftqError(
            f"{record.tensor} is {list(weight.shape)} in the source, but {list(record.shape)} in the manifest: give "
            "the right source with --source."
        )
    return weight


def _spectrum(path: Path, manifest: Manifest, record: MatrixRecord, weight: Tensor) -> Spectrum:
    from loftq_cli.artifacts.decode import decode_matrix, decode_product
    from loftq_cli.machine.precision import full_precision

    with full_precision():
        backbone = weight - decode_matrix(path, manifest, record)
        error = backbone - decode_product(path, manifest, record) if record.rank else None
        values = singular_values(weight), singular_values(backbone), None if error is None else singular_values(error)
    largest = float(values[0][0]) or 1.0
    indices = spread(len(values[0]))

    def relative(found: Tensor) -> tuple[float, ...]:
        return tuple(float(f"{float(found[index - 1]) / largest:.3g}") for index in indices)

    error_values = None if values[2] is None else relative(values[2])
    return Spectrum(record.module, record.rank, indices, relative(values[0]), relative(values[1]), error_values)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a float32 matrix [m, n] in float64 [min(m, n)], largest first.

    They are the roots of the eigenvalues of the smaller Gram matrix, which takes a fraction of the time of an SVD and
    is as exact as a drawing needs.
    """
    import torch

    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    exact = tall.double()
    return torch.linalg.eigvalsh(exact.T @ exact).clamp_min(0).sqrt().flip(0)


def spread(length: int) -> tuple[int, ...]:
    """Return at most 64 numbers from 1 to `length`, close together at both ends of a logarithmic axis' left side."""
    if length <= _POINTS:
        return tuple(range(1, length + 1))
    steps = [round(length ** (step / (_POINTS - 1))) for step in range(_POINTS)]
    return tuple(sorted({1, length, *steps, *(round(1 + (length - 1) * step / 15) for step in range(16))}))
