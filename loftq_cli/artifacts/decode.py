"""Q of one matrix, read back from an output directory by the container's own decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.artifacts import adapter
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord, read_manifest
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPES, OutputTensor, QuantizedMatrix
from loftq_cli.numerics.blocks import BlockGrid
from loftq_cli.numerics.codebooks import codebook

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"


def decode(path: str | Path, matrix: str) -> Tensor:
    """Q as every loader computes it: float32 [out, in] holding values of the model's dtype.

    Args:
        path: a finished output directory.
        matrix: module path or tensor name.

    Raises:
        LoftqError: no such directory or matrix.
    """
    manifest = read_manifest(path)
    return decode_matrix(Path(path), manifest, manifest.matrix(matrix))


def decode_matrix(path: Path, manifest: Manifest, record: MatrixRecord) -> Tensor:
    """Like `decode`, for a record at hand."""
    matrix = quantized_matrix(record)
    outputs = {output.name: output for output in get_format(manifest.format).tensors(matrix)}
    return get_format(manifest.format).decode(matrix, lambda name: _read(path, outputs[name]))


def decode_product(path: Path, manifest: Manifest, record: MatrixRecord) -> Tensor:
    """scaling · BA of a matrix with an adapter, float32 [out, in]."""
    from safetensors import safe_open

    target = adapter.AdapterTarget(
        record.module, record.kind, *record.shape, record.rank, record.parameter, record.expert
    )
    first, second = adapter.adapter_tensors(target)
    joint = adapter.joint_b(target)
    with safe_open(path / adapter.WEIGHTS, framework="pt") as file:
        if joint is None:
            lora_b = _content(file, second)
        else:
            begin = target.expert.part * target.out_features if target.expert else 0
            rows = file.get_slice(joint.name)[begin : begin + target.out_features]
            lora_b = adapter.own_columns(target, rows)
        tensors = {first.name: _content(file, first), second.name: lora_b}
    return adapter.decode_adapter(target, tensors, manifest.scaling)


def quantized_matrix(record: MatrixRecord) -> QuantizedMatrix:
    """The matrix with its grid, as the plan had it."""
    grid = BlockGrid(
        codebook(record.data_type, record.bits),
        record.block_size,
        record.layout,  # type: ignore[arg-type]
        DTYPES[record.scale_dtype],
        DTYPES[record.value_dtype],
    )
    kind: Any = record.kind
    stacked = record.expert is not None and record.expert.stacked
    # A unit's name has the expert's number behind the tensor's.
    tensor = record.tensor.rpartition("[")[0] if stacked else record.tensor
    return QuantizedMatrix(tensor, record.module, kind, *record.shape, grid, record.parameter, record.expert)


def _read(path: Path, output: OutputTensor) -> Tensor:
    from safetensors import safe_open

    index, name = path / _INDEX, (output.whole or output).name
    file = json.loads(index.read_bytes())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(path / file, framework="pt") as handle:
        return _content(handle, output)


def _content(handle: Any, output: OutputTensor) -> Tensor:
    """A tensor of an open file, or a piece of one."""
    if output.whole is None:
        return handle.get_tensor(output.name)
    first = output.offset // output.whole.row_bytes
    if len(output.shape) < len(output.whole.shape):
        return handle.get_slice(output.whole.name)[first]
    return handle.get_slice(output.whole.name)[first : first + output.shape[0]]
