"""The unit of work: one tensor of the checkpoint, or one expert of a tensor that stacks experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.checkpoint import Checkpoint, TensorInfo
from loftq_cli.checkpoint.base import read_named
from loftq_cli.formats import adapter
from loftq_cli.formats.adapter import AdapterTarget
from loftq_cli.formats.base import QuantizedMatrix
from loftq_cli.modules.reasons import Reason
from loftq_cli.tensorfile.tensors import OutputTensor

UNWEIGHTED = ("embedding", "expert")  # kinds whose inputs calibration does not see


@dataclass(frozen=True)
class Unit:
    """A matrix to quantize, or a tensor to copy. Every expert of a tensor that stacks experts is a unit of its own.

    Attributes:
        matrix: None if the tensor is copied; `reason` then gives the reason, and is None otherwise.
        target: its adapter, if any.
        source: the tensor, or the expert's entry of it, which has the expert's number in its name.
        backbone, adapter: its output tensors, or its pieces of them; `copies` are the adapter's tensors for readers
            other than PEFT.
    """

    source: TensorInfo
    module: str | None
    kind: str
    matrix: QuantizedMatrix | None
    reason: Reason | None
    target: AdapterTarget | None
    backbone: tuple[OutputTensor, ...]
    copies: tuple[OutputTensor, ...] = ()

    @property
    def tensor(self) -> str:
        return self.source.name

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Read the weights."""
        return read_named(checkpoint, self.tensor)

    @property
    def adapter(self) -> tuple[OutputTensor, ...]:
        return () if self.target is None else (*adapter.adapter_tensors(self.target), *self.copies)

    @property
    def adapter_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.adapter)

    @property
    def backbone_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.backbone)
