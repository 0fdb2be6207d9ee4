"""Read Q of one matrix back from an output directory, with the container's own decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loftq_cli.artifacts.manifest import AffineRecord, Manifest, MatrixRecord, read_manifest
from loftq_cli.formats import adapter, container_in, get_format
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, QuantizedMatrix
from loftq_cli.numerics.grids.affine import AffineGrid, ScaleRule, Zero
from loftq_cli.numerics.grids.blocks import BlockGrid, Layout
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.tensorfile.entry_names import parse_entries, whole_name

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"


def decode(path: str | Path, matrix: str) -> Tensor:
    """Return Q as every loader computes it: float32 [out, in] with values of the model's dtype.

    Args:
        path: a finished output directory.
        matrix: module path or tensor name.

    Raises:
        LoftqError: the directory or the matrix does not exist.
    """
    manifest = read_manifest(path)
    return decode_matrix(Path(path), manifest, manifest.matrix(matrix))


def decode_matrix(path: Path, manifest: Manifest, record: MatrixRecord) -> Tensor:
    """Return Q of the matrix that a record describes; see `decode`."""
    return get_format(manifest.format).decode(quantized_matrix(record), lambda name: read_tensor(path, name))


def decode_product(path: Path, manifest: Manifest, record: MatrixRecord) -> Tensor:
    """Return scaling · BA of a matrix with an adapter, float32 [out, in]."""
    b, a = read_factors(path, manifest, record)
    return b @ a


def read_factors(path: Path, manifest: Manifest, record: MatrixRecord) -> tuple[Tensor, Tensor]:
    """Return B [out, r] and A [r, in] of a matrix with an adapter, float32; PEFT adds their product to the weight."""
    from safetensors import safe_open

    target = adapter.AdapterTarget(
        record.module, record.kind, *record.shape, record.rank, record.parameter, record.expert, manifest.pooling
    )
    first, second = adapter.adapter_tensors(target)
    joint = adapter.joint_b(target)
    with safe_open(path / adapter.WEIGHTS, framework="pt") as file:
        if joint is None:
            lora_b = file.get_tensor(second.name)
        else:
            begin = target.expert.part * target.out_features if target.expert else 0
            rows = file.get_slice(joint.name)[begin : begin + target.out_features]
            lora_b = adapter.own_columns(target, rows)
        tensors = {first.name: _content(file, first.name), second.name: lora_b}
    return adapter.decode_factors(target, tensors, manifest.scaling)


def quantized_matrix(record: MatrixRecord) -> QuantizedMatrix:
    """Return the matrix with its grid, as it was planned."""
    kind: Any = record.kind
    stacked = record.expert is not None and record.expert.stacked
    # A unit's name is the tensor's name followed by the expert's number.
    tensor = whole_name(record.tensor) if stacked else record.tensor
    return QuantizedMatrix(
        tensor, record.module, kind, *record.shape, _grid(record), record.parameter, record.expert, record.heads
    )


def affine_record(grid: AffineGrid) -> AffineRecord:
    """Return the fields of an integer grid that other grids do not have."""
    return AffineRecord(
        zero=grid.zero,
        zero_dtype=DTYPE_NAMES[grid.zero_dtype],
        product_dtype=DTYPE_NAMES[grid.product_dtype],
        least_zero=grid.least_zero,
        scale_rule=grid.scale_rule,
    )


def _grid(record: MatrixRecord) -> Grid:
    scale_dtype, value_dtype = DTYPES[record.scale_dtype], DTYPES[record.value_dtype]
    if record.affine is None:
        book = codebook(record.data_type, record.bits)
        layout = cast("Layout", record.layout)
        return BlockGrid(book, record.block_size, layout, scale_dtype, value_dtype, nested=record.nested)
    return AffineGrid(
        record.bits,
        record.block_size,
        cast("Zero", record.affine.zero),
        scale_dtype,
        value_dtype,
        DTYPES[record.affine.product_dtype],
        DTYPES[record.affine.zero_dtype],
        cast("ScaleRule", record.affine.scale_rule),
        record.affine.least_zero,
    )


def read_tensor(path: Path, name: str) -> Tensor:
    """Read a tensor of the backbone, or one expert's entry of it (`experts.down_proj[3]`)."""
    from safetensors import safe_open

    container = container_in(path)
    if container is not None:
        return get_format(container.name).read_tensor(path / container.file, name)
    index, whole = path / _INDEX, whole_name(name)
    file = json.loads(index.read_bytes())["weight_map"][whole] if index.exists() else "model.safetensors"
    with safe_open(path / file, framework="pt") as handle:
        return _content(handle, name)


def _content(handle: Any, name: str) -> Tensor:
    """Read a tensor of an open file, or one entry of it."""
    piece = parse_entries(name)
    if piece is None:
        return handle.get_tensor(name)
    content = handle.get_slice(piece.whole)
    return content[piece.index] if piece.end is None else content[piece.index : piece.end]
