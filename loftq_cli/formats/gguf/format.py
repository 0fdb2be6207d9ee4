"""`gguf`: one `model.gguf` with Q4_0, Q4_1 or Q8_0 matrices, for llama.cpp's family and transformers' `gguf_file`.

A row is a sequence of blocks of 32 weights:

| type | block | value |
|---|---|---|
| Q4_0 (4 bits, symmetric) | d float16, 16 bytes of codes | d · (code - 8) |
| Q4_1 (4 bits, asymmetric) | d, m float16, 16 bytes of codes | d · code + m |
| Q8_0 (8 bits, symmetric) | d float16, 32 bytes of codes as int8 | d · (code - 128) |

Byte j of the 4-bit codes holds weight j in its low half and weight j + 16 in its high half. Values are float32. Vectors
are stored in float32, other tensors unchanged. Names are those of the gguf package; rows of Llama's queries and keys
are reordered, because ggml rotates neighbouring elements and transformers rotates halves.
`loftq_init/adapter.gguf` is a copy of the adapter for llama.cpp.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import (
    ANY_REQUEST,
    FormatDefaults,
    GridRequest,
    QuantizedMatrix,
    Refusal,
    Request,
    affine_grid,
    groups_of,
)
from loftq_cli.formats.gguf import BLOCK as _BLOCK
from loftq_cli.formats.gguf import FILE, LORA_FILE
from loftq_cli.formats.gguf.file import GgmlType, adapter_values, file_layout, model_values
from loftq_cli.formats.gguf.vocabulary import vocabulary_values
from loftq_cli.formats.refusals import INSTEAD, exclude, integers_only
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, Zero
from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize
from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile

_MODEL_TYPES = ("llama", "qwen2", "qwen3")
_REORDERED = re.compile(r"blk\.\d+\.attn_([qk])\.weight")
_QWEN3_HEAD = 128  # transformers' loader does not read other sizes from the file


class GgufFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    name = "gguf"

    def refuse(self, matrices: Sequence[QuantizedMatrix], request: Request) -> str | None:
        config = request.config
        kind = config.get("model_type")
        if kind not in _MODEL_TYPES:
            return f"it supports {', '.join(_MODEL_TYPES)} models only, not '{kind}': {INSTEAD}"
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            return f"transformers cannot read scaled rotary positions from it: {INSTEAD}"
        if kind == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
            return f"its Llama has no biases: {INSTEAD}"
        if kind == "qwen3" and config.get("head_dim", _QWEN3_HEAD) != _QWEN3_HEAD:
            return f"transformers can only read a head size of {_QWEN3_HEAD} from it: {INSTEAD}"
        return None

    def grid(self, request: GridRequest) -> Grid | Refusal:
        if refusal := integers_only(request):
            return refusal
        if request.bits not in (4, 8):
            reason = f"it has no blocks of {request.bits} bits with free scales: use 4 or 8 bits"
            return Refusal(f"{reason}, or {INSTEAD}", fatal=True)
        if request.bits == 8 and request.symmetric is False:
            return Refusal(f"its 8-bit blocks are symmetric: drop --asymmetric, or {INSTEAD}", fatal=True)
        if request.block_size != _BLOCK:
            return Refusal(f"its blocks have {_BLOCK} weights: use --group-size {_BLOCK}, or {INSTEAD}", fatal=True)
        if not request.group_divides:
            reason = f"blocks of {_BLOCK} do not divide rows of {request.in_features}"
            return Refusal(f"{reason}: leave it out with {exclude(request.module)}, or {INSTEAD}", fatal=True)
        half, single = torch.float16, torch.float32
        zero: Zero = "none" if request.symmetric else "float"
        return AffineGrid(request.bits, _BLOCK, zero, half, single, zero_dtype=half, scale_rule=request.scale_rule)

    def place(self, matrix: QuantizedMatrix, request: Request) -> QuantizedMatrix:
        found = _REORDERED.fullmatch(tensor_name(matrix.tensor))
        if found is None or request.config.get("model_type") != "llama":
            return matrix
        config = _with_defaults(request.config)
        heads = int(config["num_attention_heads"])
        if found[1] == "k":
            heads = int(config.get("num_key_value_heads") or heads)
        return dataclasses.replace(matrix, heads=heads)

    def copied(self, tensor: OutputTensor) -> OutputTensor:
        dtype = torch.float32 if len(tensor.shape) == 1 else tensor.dtype
        return OutputTensor(tensor_name(tensor.name), dtype, tensor.shape)

    def container(
        self, tensors: Sequence[OutputTensor], matrices: Sequence[QuantizedMatrix], request: Request, fingerprint: str
    ) -> TensorFile:
        types = {tensor_name(matrix.tensor): (_type(matrix), matrix.shape) for matrix in matrices}
        kind, _ = next(iter(types.values()))
        values: dict[str, Any] = {**model_values(_with_defaults(request.config), kind, fingerprint)}
        if request.tokenizer is not None:
            values |= vocabulary_values(request.tokenizer(), request.config)
        return file_layout(FILE, tensors, types, values)

    def adapter_copies(self, matrix: QuantizedMatrix, rank: int) -> tuple[OutputTensor, ...]:
        name = tensor_name(matrix.tensor)
        return (
            OutputTensor(f"{name}.lora_a", torch.float32, (rank, matrix.in_features)),
            OutputTensor(f"{name}.lora_b", torch.float32, (matrix.out_features, rank)),
        )

    def encode_copies(self, matrix: QuantizedMatrix, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
        first, second = self.adapter_copies(matrix, lora_a.shape[0])
        return {first.name: lora_a, second.name: lora_b[_file_rows(matrix, lora_b.device)].contiguous()}

    def copies_container(self, tensors: Sequence[OutputTensor], request: Request, alpha: float) -> TensorFile | None:
        arch = str(request.config["model_type"])
        return file_layout(LORA_FILE, tensors, {}, adapter_values(arch, alpha))

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        width = matrix.in_features // _BLOCK * _block_bytes(matrix)
        return (OutputTensor(tensor_name(matrix.tensor), torch.uint8, (matrix.out_features, width)),)

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        found, rows = groups_of(quantized), matrix.out_features
        codes = found.codes.reshape(rows, -1, _BLOCK)
        packed = codes ^ 0x80  # code - 128 as int8
        if matrix.grid.bits == 4:
            packed = codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4
        numbers = [found.scales] if found.zeros is None else [found.scales, found.zeros]
        heads = torch.stack([number.to(torch.float16) for number in numbers], dim=-1).view(torch.uint8)
        blocks = torch.cat([heads, packed], dim=-1).reshape(rows, -1)
        return {tensor_name(matrix.tensor): blocks[_file_rows(matrix, blocks.device)].contiguous()}

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        stored = read(tensor_name(matrix.tensor))
        blocks = torch.empty_like(stored)
        blocks[_file_rows(matrix, stored.device)] = stored
        blocks = blocks.reshape(matrix.out_features, -1, _block_bytes(matrix))
        n_numbers = 1 if affine_grid(matrix).zero == "none" else 2
        numbers = blocks[..., : 2 * n_numbers].contiguous().view(torch.float16).float()
        packed = blocks[..., 2 * n_numbers :]
        codes = torch.cat([packed & 0xF, packed >> 4], dim=-1) if matrix.grid.bits == 4 else packed ^ 0x80
        zeros = numbers[..., 1] if n_numbers == 2 else None
        codes = codes.reshape(matrix.shape).contiguous()
        return dequantize(QuantizedGroups(codes, numbers[..., 0], zeros), affine_grid(matrix))

    def read_tensor(self, file: Path, name: str) -> Tensor:
        tensors = _tensors_of(file, file.stat().st_mtime_ns)
        found = tensors[name if name in tensors else tensor_name(name)]
        content = torch.from_numpy(found.data.copy())
        return content.view(torch.bfloat16) if found.tensor_type == GgmlType.BF16 else content

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> Mapping[str, Any] | None:
        return None


def tensor_name(name: str) -> str:
    """Convert `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`.

    Raises:
        LoftqError: GGUF has no such tensor.
    """
    stem, _, leaf = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", stem)
    found = _names().get_name(stem if layer is None else stem.replace(layer[0], ".0.", 1))
    if found is None:
        raise LoftqError(f"{name} cannot be stored in a GGUF file: {INSTEAD}.")
    return f"{found if layer is None else found.replace('.0.', layer[0], 1)}.{leaf}"


@lru_cache(maxsize=1)
def _tensors_of(file: Path, changed: int) -> dict[str, Any]:
    """Return a file's tensors as of the time `changed`; reading its vocabulary takes seconds, so this is cached."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@cache
def _names() -> Any:
    """Return the gguf package's own names for one layer; Qwen3 has every tensor of the supported models."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json, completed with the defaults of its model type.

    Raises:
        LoftqError: transformers refuses a value of it.
    """
    from transformers import AutoConfig

    try:
        return {**AutoConfig.for_model(**config).to_dict(), **config}
    except Exception as error:  # transformers raises many kinds
        cause = " ".join(str(error).split())[:160]
        raise LoftqError(f"config.json has a value that transformers refuses ({cause}): correct it.") from error


def _type(matrix: QuantizedMatrix) -> GgmlType:
    if matrix.grid.bits == 8:
        return GgmlType.Q8_0
    return GgmlType.Q4_0 if affine_grid(matrix).zero == "none" else GgmlType.Q4_1


def _block_bytes(matrix: QuantizedMatrix) -> int:
    """Return the number of bytes in a block of 32 weights."""
    _, size = gguf.GGML_QUANT_SIZES[_type(matrix)]
    return size


def _file_rows(matrix: QuantizedMatrix, device: torch.device) -> Tensor:
    """Return the row of the matrix that is stored at each place of the file."""
    rows = torch.arange(matrix.out_features, device=device)
    if not matrix.heads:
        return rows
    return rows.reshape(matrix.heads, 2, -1).transpose(1, 2).reshape(-1)
