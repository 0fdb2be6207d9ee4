"""Q of one matrix, read back from an output directory by the container's own decoder."""

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
    return get_format(manifest.format).decode(quantized_matrix(record), lambda name: read_tensor(path, name))


def decode_product(path: Path, manifest: Manifest, record: MatrixRecord) -> Tensor:
    """scaling · BA of a matrix with an adapter, float32 [out, in]."""
    b, a = read_factors(path, manifest, record)
    return b @ a


def read_factors(path: Path, manifest: Manifest, record: MatrixRecord) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] of a matrix with an adapter, float32, whose product PEFT adds to the weight."""
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
    """The matrix with its grid, as the plan had it."""
    kind: Any = record.kind
    stacked = record.expert is not None and record.expert.stacked
    # A unit's name has the expert's number behind the tensor's.
    tensor = whole_name(record.tensor) if stacked else record.tensor
    return QuantizedMatrix(
        tensor, record.module, kind, *record.shape, _grid(record), record.parameter, record.expert, record.heads
    )


def affine_record(grid: AffineGrid) -> AffineRecord:
    """Return what a record keeps of an integer grid besides the fields that every grid has."""
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
    """A tensor of the backbone by its name; with an expert's number behind it, `experts.down_proj[3]`, that entry."""
    from safetensors import safe_open

    container = container_in(path)
    if container is not None:
        return get_format(container.name).read_tensor(path / container.file, name)
    index, whole = path / _INDEX, whole_name(name)
    file = json.loads(index.read_bytes())["weight_map"][whole] if index.exists() else "model.safetensors"
    with safe_open(path / file, framework="pt") as handle:
        return _content(handle, name)


def _content(handle: Any, name: str) -> Tensor:
    """A tensor of an open file, or the piece of one that `OutputTensor` gives such a name."""
    piece = parse_entries(name)
    if piece is None:
        return handle.get_tensor(name)
    content = handle.get_slice(piece.whole)
    return content[piece.index] if piece.end is None else content[piece.index : piece.end]
