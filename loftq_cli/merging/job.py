"""One merge: what it reads, what it writes and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.checkpoint.base import read_named
from loftq_cli.merging.trained_adapter import Place, TrainedAdapter
from loftq_cli.modules.orientation import Orientation
from loftq_cli.tensorfile.tensors import OutputTensor


@dataclass(frozen=True)
class Piece:
    """A matrix in its container, or a tensor in full precision; of a tensor that stacks experts one expert's share.

    Attributes:
        record: None for a tensor in full precision; `orientation` is then how it is stored.
        inputs: its tensors in the backbone; `outputs`: in the result.
        module: its path, where the adapter changes it; of an expert its parameter and number.
    """

    record: MatrixRecord | None
    inputs: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    module: str | None
    orientation: Orientation = Orientation.OUT_IN


@dataclass(frozen=True)
class Merge:
    """What the steps of one merge share."""

    manifest: Manifest
    source: Path
    checkpoint: Checkpoint
    trained: TrainedAdapter
    places: dict[str, Place]
    way: str
    dtype: torch.dtype
    cast: bool  # tensors in full precision too, because the user named a dtype

    def read(self, name: str) -> Tensor:
        """A tensor of the backbone, or one expert's share of it."""
        return read_named(self.checkpoint, name)

    def update(self, module: str, in_features: int) -> Tensor:
        """What the adapter adds to a matrix, float32 [out, in]."""
        return self.trained.update(self.places[module], in_features)
