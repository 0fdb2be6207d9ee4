"""Where the weights of a run come from: the source, its plain quantization, the backbone, the backbone with adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.artifacts.decode import decode_matrix, decode_product, quantized_matrix
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.blocks import dequantize


class Weights(Protocol):
    """Tensors by their names in the full-precision checkpoint, in its orientation."""

    @property
    def names(self) -> Sequence[str]:
        """Every tensor there is."""

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own on the CPU."""


@dataclass(frozen=True)
class SourceWeights:
    """The checkpoint as it is."""

    checkpoint: Checkpoint

    @property
    def names(self) -> Sequence[str]:
        return list(self.checkpoint.tensors)

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name)


@dataclass(frozen=True)
class BackboneWeights:
    """Q of every quantized matrix, decoded from the container's own bytes, and the tensors that were kept.

    Attributes:
        path: the output directory; `stored`: its safetensors files.
        adapter: add scaling · BA to Q, in float32.
    """

    path: Path
    stored: Checkpoint
    manifest: Manifest
    adapter: bool = False

    @property
    def names(self) -> Sequence[str]:
        return _names(self.manifest)

    def read(self, name: str) -> Tensor:
        record = _record(self.manifest, name)
        if record is None:
            return self.stored.read(name)
        weight = decode_matrix(self.path, self.manifest, record)
        if self.adapter and record.rank:
            weight += decode_product(self.path, self.manifest, record)
        return _as_stored(weight, record)


@dataclass(frozen=True)
class PlainWeights:
    """q(W): every matrix of the manifest quantized once on its own grid, no adapter; else what the backbone keeps."""

    source: Checkpoint
    stored: Checkpoint
    manifest: Manifest

    @property
    def names(self) -> Sequence[str]:
        return _names(self.manifest)

    def read(self, name: str) -> Tensor:
        record = _record(self.manifest, name)
        if record is None:
            return self.stored.read(name)
        weight = _as_stored(self.source.read(name).float(), record).contiguous()
        grid = quantized_matrix(record).grid
        step = block_quantizer(grid, torch.device("cpu")).quantize_residual(weight, weight)
        return _as_stored(dequantize(step.quantized, grid), record)


def _names(manifest: Manifest) -> Sequence[str]:
    return [*(record.tensor for record in manifest.matrices), *(record.tensor for record in manifest.kept)]


def _record(manifest: Manifest, name: str) -> MatrixRecord | None:
    return next((record for record in manifest.matrices if record.tensor == name), None)


def _as_stored(weight: Tensor, record: MatrixRecord) -> Tensor:
    """[out, in] <-> the orientation on disk."""
    return weight.T if record.kind == "conv1d" else weight
