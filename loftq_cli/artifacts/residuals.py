"""Recompute the residuals of a matrix from the files of a finished output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loftq_cli.artifacts.decode import decode_matrix, read_factors
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.numerics.lowrank.truncate import frobenius
from loftq_cli.numerics.methods.weighted import whiten


@dataclass(frozen=True)
class Residuals:
    """Residuals of one matrix read from the files: ‖W - Q - BA‖_F / ‖W‖_F, and ‖(W - Q - BA) R‖_F / ‖W R‖_F with R Rᵀ
    the second moment of the layer's inputs; None without one."""

    plain: float
    weighted: float | None


def recompute_residuals(
    path: Path, manifest: Manifest, record: MatrixRecord, weight: Tensor, moment: Tensor | None
) -> Residuals:
    """Return the residuals of one matrix, with Q and BA read from the files.

    Args:
        weight: W, stored as in the source; it is overwritten.
        moment: second moment of the layer's inputs, [in] or [in, in].
    """

    error = record.orientation.turn(weight).float().contiguous()
    norm = frobenius(error)
    whitening = None if moment is None else whiten(moment)
    weighted_norm = 0.0 if whitening is None else frobenius(whitening.apply(error))
    error -= decode_matrix(path, manifest, record)
    if record.rank:
        error.addmm_(*read_factors(path, manifest, record), alpha=-1)
    weighted = None if whitening is None else _share(frobenius(whitening.apply(error)), weighted_norm)
    return Residuals(_share(frobenius(error), norm), weighted)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
