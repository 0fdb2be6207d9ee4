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
        module: its path in the transformers model, which PEFT targets; for an expert, its parameter and number,
            `model.layers.0.mlp.experts.gate_up_proj[3]`.
        kind: an embedding table [vocabulary, width] has out_features = vocabulary and in_features = width.
        grid: the container's own grid for it.
        parameter: the parameter that PEFT adapts instead of a module, such as
            `model.layers.0.mlp.experts.gate_up_proj`; it must be dense in the running model. "" for a module.
        expert: the expert's place, if it is an expert's matrix.
        heads: number of attention heads whose rotary halves the container stores interleaved; 0 if rows keep their
            order.
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
        """Return the on-disk path of the module: the tensor's name without `.weight`."""
        return self.tensor.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def orientation(self) -> Orientation:
        """Return the orientation in which the checkpoint stores it."""
        return orientation_of(self.kind, self.expert)

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    def stored(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> OutputTensor:
        """Return an output tensor of this matrix, or for a stacked expert its piece of the stacked tensor."""
        if self.expert is None or not self.expert.stacked:
            return OutputTensor(name, dtype, shape)
        return OutputTensor(name, dtype, (self.expert.count, *shape)).piece(self.expert.index)

    @property
    def information_bits(self) -> int:
        """Return the bits of information in codes, scales and own levels, however the container stores them."""
        return self.grid.information_bits(*self.shape)


@dataclass(frozen=True)
class GridRequest:
    """The user's request for one matrix, before the container decides.

    Attributes:
        block_size: number of weights that share a scale; 0 for a whole row (integers only).
        dtype: the model's.
        symmetric, scale_rule: of integers; None leaves the choice to the container.
        double_quant: quantize the scales too.
        module: path in the transformers model.
        parameter: PEFT adapts it as a parameter and not as a module, so it must be dense in the running model.
        unrounded: keep values in float32 if the container can, so that an adapter can be added to the zeros exactly.
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
        task_type: PEFT's task type of the model; None if it has none.
        dequantize: let the loader unpack while loading, if it can.
        config: the model's config.json.
        dense_experts: matrices of single experts that stay in full precision.
        kept_matrices: names on disk, without `.weight`, of all matrices that stay in full precision, whatever
            transformers makes of them: other readers may build a quantizable layer for each.
        tokenizer: reads its tokenizer.json; None if it has none.
    """

    task_type: str | None
    dequantize: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], bytes] | None = None
    dense_experts: Sequence[str] = ()
    kept_matrices: Sequence[str] = ()


ANY_REQUEST = Request(None)


@dataclass(frozen=True)
class Refusal:
    """The reason why a container cannot hold a matrix. `fatal` refusals end the plan, because another recipe would
    work; the others keep that one matrix in full precision."""

    reason: str
    fatal: bool


def block_grid(matrix: QuantizedMatrix) -> BlockGrid:
    """Return the grid of a matrix in a container of codebooks."""
    assert isinstance(matrix.grid, BlockGrid), "this container gave the grid"
    return matrix.grid


def affine_grid(matrix: QuantizedMatrix) -> AffineGrid:
    """Return the grid of a matrix in a container of integers."""
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
        holds_stacked_experts: the same for a checkpoint that stores all experts of a layer in one 3-D tensor.
    """

    name: str
    holds_experts: bool
    holds_stacked_experts: bool

    def refuse(self, matrices: Sequence[QuantizedMatrix], request: Request) -> str | None:
        """Return why the model, or these matrices in one checkpoint, do not fit, as the end of a sentence that names a
        format that can hold them; None if they fit. First called without matrices."""

    def place(self, matrix: QuantizedMatrix, request: Request) -> QuantizedMatrix:
        """Return the matrix with the container's own properties that depend on its place in the model."""

    def copied(self, tensor: OutputTensor) -> OutputTensor:
        """Return the output tensor for a tensor that is not quantized; the shape does not change."""

    def container(
        self, tensors: Sequence[OutputTensor], matrices: Sequence[QuantizedMatrix], request: Request, fingerprint: str
    ) -> TensorFile | None:
        """The one file that holds everything, or None for safetensors shards."""

    def adapter_copies(self, matrix: QuantizedMatrix, rank: int) -> tuple[OutputTensor, ...]:
        """Return further copies of A and B, for readers that do not support PEFT."""

    def encode_copies(self, matrix: QuantizedMatrix, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
        """Return the contents of `adapter_copies`, by name, from A [r, in] and B [out, r] as PEFT has them."""

    def copies_container(self, tensors: Sequence[OutputTensor], request: Request, alpha: float) -> TensorFile | None:
        """Return the file of all adapter copies."""

    def grid(self, request: GridRequest) -> Grid | Refusal:
        """Return the grid for LoftQ's alternation, exactly as the container's loader dequantizes it."""

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        """Return the output tensors of a matrix; names, dtypes and shapes depend on the plan alone."""

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        """Return the contents of `tensors`, by name."""

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        """Return Q as the container's loader computes it: float32 [out, in]. `read` returns output tensors by name."""

    def read_tensor(self, file: Path, name: str) -> Tensor:
        """Return a tensor of the container's own file, by its name there or in the source."""

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> Mapping[str, Any] | None:
        """Return `quantization_config` of config.json, or None for plain dense weights. `dense_linears` are the module
        paths of linear layers that stay in full precision."""


class FormatDefaults:
    """Defaults for most containers: accepts every model, holds no experts, keeps names and order, writes safetensors
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
        raise AssertionError("only containers that write a file of their own are asked for its tensors")
