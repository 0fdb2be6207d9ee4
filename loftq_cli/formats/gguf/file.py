"""A GGUF file laid out before its content exists: magic, key-values, tensor table, then aligned data.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile

_ALIGNMENT = 32
_VERSION = 3


class GgmlType(enum.IntEnum):
    """Types of ggml tensors, by their numbers in a file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    BF16 = 30

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 32 weights."""
        return {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[self.name]


_PLAIN = {torch.float32: GgmlType.F32, torch.float16: GgmlType.F16, torch.bfloat16: GgmlType.BF16}
_FILE_TYPES = {GgmlType.Q4_0: 2, GgmlType.Q4_1: 3, GgmlType.Q8_0: 7}


def model_values(config: Mapping[str, Any], kind: GgmlType, fingerprint: str) -> dict[str, int | float | str]:
    """The key-values that describe a Llama-like model, from its config.json."""
    arch, heads = str(config["model_type"]), int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    return {
        "general.architecture": arch,
        "general.name": "loftq",
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        "general.alignment": _ALIGNMENT,
        "loftq.fingerprint": fingerprint,
        f"{arch}.block_count": int(config["num_hidden_layers"]),
        f"{arch}.context_length": int(config["max_position_embeddings"]),
        f"{arch}.embedding_length": int(config["hidden_size"]),
        f"{arch}.feed_forward_length": int(config["intermediate_size"]),
        f"{arch}.vocab_size": int(config["vocab_size"]),
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{arch}.attention.key_length": head_size,
        f"{arch}.attention.value_length": head_size,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.dimension_count": head_size,
        f"{arch}.rope.freq_base": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
    }


def adapter_values(architecture: str, alpha: float) -> dict[str, int | float | str]:
    """The key-values of a LoRA file; `alpha` is divided by each adapter's rank, as in PEFT."""
    return {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.alignment": _ALIGNMENT,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }


def file_layout(
    name: str,
    tensors: Sequence[OutputTensor],
    quantized: Mapping[str, tuple[GgmlType, tuple[int, int]]],
    values: Mapping[str, Any],
) -> TensorFile:
    """The file's header, and every tensor's place.

    Args:
        quantized: type and shape [out, in] of the tensors that hold blocks; the others are plain.
    """
    table, offset, offsets = b"", 0, {}
    for tensor in tensors:
        kind, shape = quantized.get(tensor.name) or (_PLAIN[tensor.dtype], tensor.shape)
        table += _text(tensor.name) + struct.pack("<I", len(shape))
        table += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        table += struct.pack("<IQ", kind, offset)
        offsets[tensor.name] = offset
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(values))
    header += b"".join(_text(key) + _value(value) for key, value in values.items()) + table
    header += bytes(-len(header) % _ALIGNMENT)
    starts = {tensor: len(header) + place for tensor, place in offsets.items()}
    return TensorFile(name, header, tuple(tensors), starts)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """A key's value with its type: uint32 is 4, int32 in lists 5, float32 6, a string 8, a list 9."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    code, letter = (6, "f") if value and isinstance(value[0], float) else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{letter}", 9, code, len(value), *value)
