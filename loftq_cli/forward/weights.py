"""Weights for a forward run: the source, its plain quantization, the backbone, or the backbone with adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.artifacts.decode import as_described, decode_matrix, decode_product, quantized_matrix, read_tensor
from loftq_cli.artifacts.manifest import KeptRecord, Manifest, MatrixRecord
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.checkpoint.base import read_named
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid, dequantize
from loftq_cli.tensorfile.entry_names import parse_entries


class Weights(Protocol):
    """Tensors by their names in the full-precision checkpoint, in the orientation on disk."""

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors."""

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in memory of its own."""


@dataclass(frozen=True)
class SourceWeights:
    """The unchanged checkpoint."""

    checkpoint: Checkpoint

    @property
    def names(self) -> Sequence[str]:
        return list(self.checkpoint.tensors)

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name)


@dataclass(frozen=True)
class LoadedWeights:
    """Of a model that has its weights already (`opening.hold_model`): there is nothing to read."""

    @property
    def names(self) -> Sequence[str]:
        return ()

    def read(self, name: str) -> Tensor:
        raise KeyError(name)


class _Converted(ABC):
    """The tensors of a conversion by their names in the checkpoint. The manifest lists stacked experts one by one;
    `read` returns the whole stack."""

    manifest: Manifest

    @property
    def names(self) -> Sequence[str]:
        return list(self._entries)

    def read(self, name: str) -> Tensor:
        (first, *others) = self._entries[name]
        if first.tensor == name:
            return self._one(first)
        return torch.stack([self._one(record) for record in (first, *others)])

    @abstractmethod
    def _one(self, record: MatrixRecord | KeptRecord) -> Tensor:
        """Return the tensor of one record in the orientation on disk."""

    @cached_property
    def _entries(self) -> dict[str, list[MatrixRecord | KeptRecord]]:
        found: dict[str, list[tuple[int, MatrixRecord | KeptRecord]]] = {}
        records: list[MatrixRecord | KeptRecord] = [*self.manifest.matrices, *self.manifest.kept]
        for record in records:
            entry = parse_entries(record.tensor)
            name, index = (entry.whole, entry.index) if entry else (record.tensor, 0)
            found.setdefault(name, []).append((index, record))
        return {name: [record for _, record in sorted(some, key=itemgetter(0))] for name, some in found.items()}


@dataclass(frozen=True)
class BackboneWeights(_Converted):
    """Q of every quantized matrix, decoded from the container's bytes, and the tensors that were kept.

    Attributes:
        path: the output directory.
        adapter: add scaling · BA to Q, in float32.
    """

    path: Path
    manifest: Manifest
    adapter: bool = False

    def _one(self, record: MatrixRecord | KeptRecord) -> Tensor:
        if isinstance(record, KeptRecord):
            return read_tensor(self.path, record.tensor)
        weight = decode_matrix(self.path, self.manifest, record)
        if self.adapter and record.rank:
            weight += decode_product(self.path, self.manifest, record)
        return _as_stored(weight, record)


@dataclass(frozen=True)
class PlainWeights(_Converted):
    """q(W): every matrix of the manifest quantized once on its own grid, no adapter, and the tensors that were kept.

    Levels chosen together with the scales (`--levels`) are not those of plain quantization, which uses `nf` instead.
    """

    source: Checkpoint
    path: Path
    manifest: Manifest

    def _one(self, record: MatrixRecord | KeptRecord) -> Tensor:
        if isinstance(record, KeptRecord):
            return read_tensor(self.path, record.tensor)
        weight = _as_stored(read_named(self.source, record.tensor).float(), record).contiguous()

        def quantized() -> Tensor:
            grid = plain_grid(self.manifest, record)
            step = block_quantizer(grid, weight.device).quantize_residual(weight, weight)
            return dequantize(step.quantized, grid)

        return _as_stored(as_described(self.path, record, quantized), record)


def plain_grid(manifest: Manifest, record: MatrixRecord) -> Grid:
    """Return the grid for plain quantization at the same bits."""
    grid = quantized_matrix(record).grid
    if not isinstance(grid, BlockGrid) or record.data_type != manifest.recipe.get("levels"):
        return grid
    return replace(grid, codebook=codebook("nf", record.bits))


def _as_stored(weight: Tensor, record: MatrixRecord) -> Tensor:
    """Convert between [out, in] and the orientation on disk."""
    return record.orientation.turn(weight)
