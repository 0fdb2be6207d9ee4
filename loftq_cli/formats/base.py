"""What every container tells the rest of the program: its grid, its tensors, its bytes and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks

MatrixKind = Literal["linear", "conv1d", "head", "embedding"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file, known before any weight is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class QuantizedMatrix:
    """One weight matrix as a container holds it.

    Attributes:
        tensor: its name on disk, e.g. `model.layers.0.self_attn.q_proj.weight`.
        module: its path in the transformers model, which PEFT targets.
        kind: `conv1d` is stored [in, out] in the source; everything else [out, in]. An embedding's table [vocabulary,
            width] counts as out_features = vocabulary, in_features = width.
        grid: the container's own grid for it.
    """

    tensor: str
    module: str
    kind: MatrixKind
    out_features: int
    in_features: int
    grid: BlockGrid

    @property
    def prefix(self) -> str:
        """The on-disk path of the module: the tensor's name without `.weight`."""
        return self.tensor.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def information_bits(self) -> int:
        """Bits that codes, scales and levels of the matrix's own carry, however the container stores them."""
        scales = self.grid.n_blocks(*self.shape) * self.grid.scale_dtype.itemsize * 8
        levels = 32 * len(self.grid.codebook.levels) if self.grid.codebook.fitted else 0
        return self.weights * self.grid.codebook.bits + scales + levels


@dataclass(frozen=True)
class GridRequest:
    """What the user asks of one matrix, before the container has its say."""

    kind: MatrixKind
    out_features: int
    in_features: int
    bits: int
    data_type: str
    block_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Refusal:
    """Why a container cannot hold a matrix. `fatal` refusals are the recipe's fault and end the plan; the others leave
    that one matrix in full precision."""

    reason: str
    fatal: bool


class Format(Protocol):
    """A container. Pure: tensors and dictionaries in and out, no files."""

    name: str

    def grid(self, request: GridRequest) -> BlockGrid | Refusal:
        """The grid LoftQ alternates on, exactly as the container's loader dequantizes it."""

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        """The output tensors of a matrix: names, dtypes and shapes follow from the plan alone."""

    def encode(self, matrix: QuantizedMatrix, quantized: QuantizedBlocks) -> dict[str, Tensor]:
        """The bytes of `tensors`, by name."""

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        """Q as the container's loader computes it: float32 [out, in]. `read` gives an output tensor by name."""

    def quantization_config(
        self, matrices: Sequence[QuantizedMatrix], dense_linears: Sequence[str], dtype: torch.dtype
    ) -> Mapping[str, Any] | None:
        """`quantization_config` of config.json (None: plain dense weights). `dense_linears` are the module paths of
        linear layers that stay in full precision."""
