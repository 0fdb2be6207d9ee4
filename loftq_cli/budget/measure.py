"""The pre-pass of mixed precision: measure the residual of every matrix at every width, and its spectrum.

Matrices are read one at a time, and only a few numbers are kept. They are stored in the user's cache folder, keyed by
the state of the source's files, so that `quantize` after `plan` does not measure again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.checkpoint import Checkpoint, TensorInfo
from loftq_cli.checkpoint.base import read_named
from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import QuantizedMatrix
from loftq_cli.kernels import block_quantizer
from loftq_cli.machine.cache import cache_folder, keep, read_cached
from loftq_cli.machine.usage import versions
from loftq_cli.numerics.lowrank.truncate import frobenius, krylov_low_rank

_DEPTH = 2  # of the Krylov space: it is used to compare ranks, and its small error is similar in all matrices
_FIGURES = 7  # significant digits kept: fewer than float32 sums guarantee on any device


@dataclass(frozen=True)
class Probe:
    """One matrix to measure: its place in the source, and its quantized form at each width."""

    source: TensorInfo
    widths: Mapping[int, QuantizedMatrix]


@dataclass(frozen=True)
class Curve:
    """The residuals of plain quantization of one matrix.

    Attributes:
        norm: ‖W‖_F.
        residuals: width → ‖W - q(W)‖_F / ‖W‖_F.
    """

    norm: float
    residuals: Mapping[int, float]


class Measurements:
    """Measurements of one source, cached between runs.

    Args:
        origin: identifies the source: a directory, or a repository with its commit.
        progress: called with the number of finished matrices and the total.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        origin: str,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._checkpoint, self._origin, self._device, self._progress = checkpoint, origin, device, progress
        name = hashlib.sha256(f"{origin} {checkpoint.fingerprint}".encode()).hexdigest()[:24]
        self._path = cache_folder() / "curves" / f"{name}.json"
        self._known = read_cached(self._path, list[float])
        self._states: dict[str, object] = {}

    def curves(self, probes: Sequence[Probe]) -> list[Curve]:
        """Quantize each matrix once at each width; matrices with cached results are not read."""
        return [self._curve(probe, i, len(probes)) for i, probe in enumerate(probes)]

    def spectra(self, probes: Sequence[Probe], rank: int) -> list[tuple[float, ...]]:
        """Return the leading `rank` singular values of W - q(W) over ‖W‖_F, descending, for matrices of one width."""
        return [self._spectrum(probe, rank, i, len(probes)) for i, probe in enumerate(probes)]

    def save(self) -> None:
        """Store the measurements in the cache."""
        keep(self._path, self._known)

    def _curve(self, probe: Probe, done: int, total: int) -> Curve:
        keys = {width: self._key(probe, "plain", width) for width in probe.widths}
        missing = [width for width, key in keys.items() if key not in self._known]
        if missing:
            self._progress(done, total)
            weight = self._weight(probe)
            norm = frobenius(weight)
            for width in missing:
                residual = self._residual(probe.widths[width], weight)
                self._known[keys[width]] = [_rounded(norm), _rounded(frobenius(residual) / norm if norm else 0.0)]
                del residual
        return Curve(
            norm=next(self._known[key][0] for key in keys.values()),
            residuals={width: self._known[key][1] for width, key in keys.items()},
        )

    def _spectrum(self, probe: Probe, rank: int, done: int, total: int) -> tuple[float, ...]:
        ((width, matrix),) = probe.widths.items()
        key = self._key(probe, f"spectrum {rank}", width)
        if key not in self._known:
            self._progress(done, total)
            weight = self._weight(probe)
            norm = frobenius(weight)
            found = krylov_low_rank(
                self._residual(matrix, weight),
                min(rank, *matrix.shape),
                depth=_DEPTH,
                generator=torch.Generator().manual_seed(0),
            )
            self._known[key] = [_rounded(float(value) / norm if norm else 0.0) for value in found.s]
        return tuple(self._known[key])

    def _weight(self, probe: Probe) -> Tensor:
        weight = read_named(self._checkpoint, probe.source.name).to(self._device).float()
        if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise LoftqError(
                f"{probe.source.name} in {probe.source.file} holds a NaN or an infinity: repair the checkpoint, or "
                "leave the matrix out with --exclude."
            )
        matrix = next(iter(probe.widths.values()))
        return matrix.orientation.turn(weight).contiguous()

    def _residual(self, matrix: QuantizedMatrix, weight: Tensor) -> Tensor:
        """Return W - q(W)."""
        return block_quantizer(matrix.grid, weight.device).quantize_residual(weight, weight).residual

    def _key(self, probe: Probe, what: str, width: int) -> str:
        state = [self._state(probe.source.file), probe.source.name, what, str(probe.widths[width].grid), versions()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]

    def _state(self, file: str) -> object:
        """Return size and time of the file; for a file on the Hub the commit is enough."""
        if file not in self._states:
            try:
                found = os.stat(self._checkpoint.path / file)
                self._states[file] = [file, found.st_size, found.st_mtime_ns]
            except OSError:
                self._states[file] = [file]
        return self._states[file]


def _rounded(value: float) -> float:
    return float(f"{value:.{_FIGURES}g}")
