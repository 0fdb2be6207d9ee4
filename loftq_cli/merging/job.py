"""The data of one merge: what it reads, what it writes and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.checkpoint import Checkpoint, SideFile
from loftq_cli.checkpoint.base import read_named
from loftq_cli.merging.saved_tensors import SavedTensor
from loftq_cli.merging.trained_adapter import Place, TrainedAdapter
from loftq_cli.modules.orientation import Orientation
from loftq_cli.tensorfile.layout import WeightFiles
from loftq_cli.tensorfile.tensors import OutputTensor


@dataclass(frozen=True)
class Piece:
    """One step of a merge: a matrix in its container, a tensor in full precision, or one expert of a stacked tensor.

    Attributes:
        record: None for a tensor in full precision; `orientation` is then how it is stored.
        inputs: its tensors in the backbone; `outputs`: in the result.
        module: its path if the adapter changes it, else None; for an expert its parameter and number.
    """

    record: MatrixRecord | None
    inputs: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    module: str | None
    orientation: Orientation = Orientation.OUT_IN


@dataclass(frozen=True)
class Merge:
    """The objects that all steps of one merge share.

    Attributes:
        source: the backbone's directory; `checkpoint`: its tensors, opened.
        places: module of the backbone → its place in the adapter.
        saved: tensor of the backbone, or a new one → what the adapter replaces it with.
        cast: tensors in full precision get `dtype` too, because the user named one.
        float32: the tensors that transformers keeps in float32 even so.
    """

    manifest: Manifest
    source: Path
    checkpoint: Checkpoint
    trained: TrainedAdapter
    places: dict[str, Place]
    way: str
    dtype: torch.dtype
    cast: bool
    saved: dict[str, SavedTensor] = field(default_factory=dict)
    float32: frozenset[str] = frozenset()

    def read(self, name: str) -> Tensor:
        """Read a tensor of the backbone, or one expert's share of it."""
        return read_named(self.checkpoint, name)

    def update(self, module: str, in_features: int) -> Tensor:
        """Return what the adapter adds to a matrix, float32 [out, in]."""
        return self.trained.update(self.places[module], in_features)


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write, decided before any weight is read.

    Attributes:
        fingerprint: of backbone, adapter and way together.
        config: config.json of the trained model.
        side_files: copied unchanged from the backbone.
    """

    pieces: tuple[Piece, ...]
    weights: WeightFiles
    adapter_sha256: str
    fingerprint: str
    config: dict[str, Any]
    side_files: tuple[SideFile, ...]

    @property
    def backbone_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(tensor.nbytes for piece in self.pieces for tensor in piece.outputs)
