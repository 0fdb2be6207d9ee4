"""Lay out a GGUF file before its content exists: header from the gguf package's writer, then aligned data.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType, LlamaFileType
from gguf.gguf_writer import WriterState

from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile

_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_ARCHITECTURE = "general.architecture"
_PLAIN = {torch.float32: GgmlType.F32, torch.float16: GgmlType.F16, torch.bfloat16: GgmlType.BF16}
_FILE_TYPES = {
    GgmlType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GgmlType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GgmlType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_VALUE_TYPES = {
    str: GGUFValueType.STRING,
    float: GGUFValueType.FLOAT32,
    int: GGUFValueType.UINT32,
    list: GGUFValueType.ARRAY,
}


def model_values(config: Mapping[str, Any], kind: GgmlType, fingerprint: str) -> dict[str, int | float | str]:
    """Return the key-values that describe a Llama-like model, from its config.json."""
    arch, heads = str(config["model_type"]), int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    return {
        "general.architecture": arch,
        "general.name": "loftq",
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
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
    """Return the key-values of a LoRA file; readers divide `alpha` by each adapter's rank, as PEFT does."""
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
    """Lay out the file: its header, and every tensor's place.

    Args:
        quantized: type and shape [out, in] of the tensors that consist of blocks; the others are plain.
        values: str, float, int and list values by key, with `general.architecture`. Empty lists are left out.
    """
    kinds = {tensor.name: quantized.get(tensor.name) or (_PLAIN[tensor.dtype], tensor.shape) for tensor in tensors}
    header = _header(tensors, kinds, values)
    offset, starts = len(header), {}
    for tensor in tensors:
        starts[tensor.name] = offset
        offset += gguf.GGUFWriter.ggml_pad(tensor.nbytes, _ALIGNMENT)
    return TensorFile(name, header, tuple(tensors), starts)


def _header(
    tensors: Sequence[OutputTensor],
    kinds: Mapping[str, tuple[GgmlType, tuple[int, ...]]],
    values: Mapping[str, Any],
) -> bytes:
    """Return everything before the data: magic, key-values and tensor table, padded to the alignment."""
    writer = gguf.GGUFWriter(None, values[_ARCHITECTURE])
    for key, value in values.items():
        if key == _ARCHITECTURE or value == []:  # the writer has added the first already, and refuses the second
            continue
        # If the type of a list's items is given, the writer does not inspect each of them.
        items = GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key, value, _VALUE_TYPES[type(value)], items)
    for tensor in tensors:
        kind, shape = kinds[tensor.name]
        # The numpy type is not used if the ggml type is given, unless it is uint8.
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    buffer = io.BytesIO()
    output: Any = writer  # the writer opens a file on disk unless it already has an open one
    output.fout, output.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(buffer, buffer.tell())
    return buffer.getvalue()
