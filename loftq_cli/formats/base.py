"""The interface of a container's implementation: its grid, its tensors, their bytes and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from loftq_cli.modules.experts import Expert
from loftq_cli.modules.orientation import Orientation, orientation_of
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, ScaleRule
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.grids.grid import Grid, Quantized
from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile

MatrixKind = Literal["linear", "conv1d", "head", "embedding", "expert"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class QuantizedMatrix:
    """One weight matrix as a container holds it.

    Attributes:
        tensor: its name on disk, e.g. `model.layers.0.self_attn.q_proj.weight`.
        module: its path in the transformers model, which PEFT targets; of an expert its parameter and number,
            `model.layers.0.mlp.experts.gate_up_proj[3]`.
        kind: an embedding's table [vocabulary, width] counts as out_features = vocabulary, in_features = width.
        grid: the container's own grid for it.
        parameter: the parameter that PEFT adapts in place of a module, such as
            `model.layers.0.mlp.experts.gate_up_proj`; it has to be dense in the running model. "" for a module.
        expert: which expert's matrix this is.
        heads: attention heads whose rotary halves the container stores interleaved; 0 where rows keep their order.
    """

    tensor: str
    module: str
    kind: MatrixKind
    out_features: int
    in_features: int
    grid: Grid
    parameter: str = ""
    expert: Expert | None = None
    heads: int = 0

    @property
    def prefix(self) -> str:
        """The on-disk path of the module: the tensor's name without `.weight`."""
        return self.tensor.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def orientation(self) -> Orientation:
        """How the checkpoint stores it."""
        return orientation_of(self.kind, self.expert)

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
        return self.grid.information_bits(*self.shape)


@dataclass(frozen=True)
class GridRequest:
    """The user's request for one matrix, before the container decides.

    Attributes:
        block_size: weights that share a scale; 0 is a whole row (integers only).
        dtype: the model's.
        symmetric, scale_rule: of integers; None leaves the choice to the container.
        double_quant: quantize the scales too.
        module: path in the transformers model.
        parameter: PEFT adapts it as a parameter and not as a module, so it has to be dense in the running model.
        unrounded: keep values in float32 where the container can, so that an adapter can be added to the zeros exactly.
    """

    kind: MatrixKind
    out_features: int
    in_features: int
    bits: int
    data_type: str
    block_size: int
    dtype: torch.dtype
    symmetric: bool | None = None
    scale_rule: ScaleRule = "mse"
    double_quant: bool = False
    module: str = ""
    parameter: bool = False
    unrounded: bool = False

    @property
    def group_divides(self) -> bool:
        """True if rows are a whole number of groups."""
        return self.block_size == 0 or self.in_features % self.block_size == 0


@dataclass(frozen=True)
class Request:
    """The user's request for the whole output, before the container decides.

    Attributes:
        task_type: PEFT's name of what the model does, None where it has none.
        dequantize: let the loader unpack while loading, where it can.
        config: the model's config.json.
        dense_experts: matrices of single experts that stay in full precision.
        tokenizer: reads its tokenizer.json; None where it has none.
    """

    task_type: str | None
    dequantize: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], bytes] | None = None
    dense_experts: Sequence[str] = ()


ANY_REQUEST = Request(None)


@dataclass(frozen=True)
class Refusal:
    """Why a container cannot hold a matrix. `fatal` refusals are the recipe's fault and end the plan; the others leave
    that one matrix in full precision."""

    reason: str
    fatal: bool


def block_grid(matrix: QuantizedMatrix) -> BlockGrid:
    """The grid of a matrix in a container of codebooks."""
    assert isinstance(matrix.grid, BlockGrid), "this container gave the grid"
    return matrix.grid


def affine_grid(matrix: QuantizedMatrix) -> AffineGrid:
    """The grid of a matrix in a container of integers."""
    assert isinstance(matrix.grid, AffineGrid), "this container gave the grid"
    return matrix.grid


def blocks_of(quantized: Quantized) -> QuantizedBlocks:
    """Narrow the result of a codebook grid to its type."""
    assert isinstance(quantized, QuantizedBlocks), "blocks belong to a codebook grid"
    return quantized


def groups_of(quantized: Quantized) -> QuantizedGroups:
    """Narrow the result of an integer grid to its type."""
    assert isinstance(quantized, QuantizedGroups), "groups belong to an integer grid"
    return quantized


class Format(Protocol):
    """A container. Pure: tensors and dictionaries in and out, no files.

    Attributes:
        holds_experts: its loader can fill the stacked parameters that transformers keeps experts in.
        holds_stacked_experts: also from a checkpoint that stores all experts of a layer in one 3-D tensor.
    """

    name: str
    holds_experts: bool
    holds_stacked_experts: bool

    def refuse(self, matrices: Sequence[QuantizedMatrix], request: Request) -> str | None:
        """Why the model, or these matrices in one checkpoint, do not fit, as a sentence's end that names a format that
        can. Asked first without matrices."""

    def place(self, matrix: QuantizedMatrix, request: Request) -> QuantizedMatrix:
        """The matrix with what the container makes of its place in the model."""

    def copied(self, tensor: OutputTensor) -> OutputTensor:
        """Return the output tensor for one that is not quantized; its shape stays."""

    def container(
        self, tensors: Sequence[OutputTensor], matrices: Sequence[QuantizedMatrix], request: Request, fingerprint: str
    ) -> TensorFile | None:
        """The one file that holds everything, or None for safetensors shards."""

    def adapter_copies(self, matrix: QuantizedMatrix, rank: int) -> tuple[OutputTensor, ...]:
        """Return further copies of A and B, for readers that do not support PEFT."""

    def encode_copies(self, matrix: QuantizedMatrix, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
        """The bytes of `adapter_copies`, by name. A [r, in] and B [out, r] as PEFT has them."""

    def copies_container(self, tensors: Sequence[OutputTensor], request: Request, alpha: float) -> TensorFile | None:
        """The file of all adapter copies."""

    def grid(self, request: GridRequest) -> Grid | Refusal:
        """The grid LoftQ alternates on, exactly as the container's loader dequantizes it."""

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        """The output tensors of a matrix: names, dtypes and shapes follow from the plan alone."""

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        """The bytes of `tensors`, by name."""

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        """Q as the container's loader computes it: float32 [out, in]. `read` gives an output tensor by name."""

    def read_tensor(self, file: Path, name: str) -> Tensor:
        """Return a tensor of the container's own file, by its name there or in the source."""

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> Mapping[str, Any] | None:
        """`quantization_config` of config.json (None: plain dense weights). `dense_linears` are the module paths of
        linear layers that stay in full precision."""


class FormatDefaults:
    """Defaults that suit most containers: no refusal of a whole model, no experts, names and order kept, safetensors
    shards."""

    holds_experts = False
    holds_stacked_experts = False

    def refuse(self, matrices: Sequence[QuantizedMatrix], request: Request) -> str | None:
        return None

    def place(self, matrix: QuantizedMatrix, request: Request) -> QuantizedMatrix:
        return matrix

    def copied(self, tensor: OutputTensor) -> OutputTensor:
        return tensor

    def container(
        self, tensors: Sequence[OutputTensor], matrices: Sequence[QuantizedMatrix], request: Request, fingerprint: str
    ) -> TensorFile | None:
        return None

    def adapter_copies(self, matrix: QuantizedMatrix, rank: int) -> tuple[OutputTensor, ...]:
        return ()

    def encode_copies(self, matrix: QuantizedMatrix, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
        return {}

    def copies_container(self, tensors: Sequence[OutputTensor], request: Request, alpha: float) -> TensorFile | None:
        return None

    def read_tensor(self, file: Path, name: str) -> Tensor:
        raise NotImplementedError("this container's tensors are in safetensors files")
