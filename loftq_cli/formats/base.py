"""What every container tells the rest of the program: its grid, its tensors, its bytes and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from loftq_cli.experts import Expert
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks

MatrixKind = Literal["linear", "conv1d", "head", "embedding", "expert"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file, known before any weight is read; or a piece of one.

    Attributes:
        whole: the tensor that this is a piece of, so many bytes (`offset`) from its beginning; None for a tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: OutputTensor | None = None
    offset: int = 0

    def piece(self, index: int) -> OutputTensor:
        """One entry of the first dimension."""
        return OutputTensor(f"{self.name}[{index}]", self.dtype, self.shape[1:], self, index * self.row_bytes)

    def rows(self, first: int, count: int) -> OutputTensor:
        """`count` entries of the first dimension."""
        name, shape = f"{self.name}[{first}:{first + count}]", (count, *self.shape[1:])
        return OutputTensor(name, self.dtype, shape, self, first * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class QuantizedMatrix:
    """One weight matrix as a container holds it.

    Attributes:
        tensor: its name on disk, e.g. `model.layers.0.self_attn.q_proj.weight`.
        module: its path in the transformers model, which PEFT targets; of an expert its parameter and number,
            `model.layers.0.mlp.experts.gate_up_proj[3]`.
        kind: `conv1d` is stored [in, out] in the source; everything else [out, in]. An embedding's table [vocabulary,
            width] counts as out_features = vocabulary, in_features = width.
        grid: the container's own grid for it.
        parameter: the parameter that PEFT adapts in place of a module, such as
            `model.layers.0.mlp.experts.gate_up_proj`; it has to be dense in the running model. "" for a module.
        expert: which expert's matrix this is.
    """

    tensor: str
    module: str
    kind: MatrixKind
    out_features: int
    in_features: int
    grid: BlockGrid
    parameter: str = ""
    expert: Expert | None = None

    @property
    def prefix(self) -> str:
        """The on-disk path of the module: the tensor's name without `.weight`."""
        return self.tensor.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint stores [in, out]."""
        return self.kind == "conv1d" or (self.expert is not None and self.expert.transposed)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    def stored(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> OutputTensor:
        """An output tensor of this matrix; of a stacked expert its piece of the tensor of all."""
        if self.expert is None or not self.expert.stacked:
            return OutputTensor(name, dtype, shape)
        return OutputTensor(name, dtype, (self.expert.count, *shape)).piece(self.expert.index)

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
    """A container. Pure: tensors and dictionaries in and out, no files.

    Attributes:
        holds_experts: its loader can fill the stacked parameters that transformers keeps experts in.
    """

    name: str
    holds_experts: bool

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
