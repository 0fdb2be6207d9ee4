"""Q of one matrix, read back from an output directory by the container's own decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from loftq_cli.artifacts import adapter
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord, read_manifest
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, QuantizedMatrix
from loftq_cli.formats.gguf import FILE as GGUF_FILE
from loftq_cli.numerics.affine import AffineGrid
from loftq_cli.numerics.blocks import BlockGrid, Layout
from loftq_cli.numerics.codebooks import codebook
from loftq_cli.numerics.grids import Grid

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

    target = adapter.AdapterTarget(record.module, record.kind, *record.shape, record.rank, manifest.pooling)
    with safe_open(path / adapter.WEIGHTS, framework="pt") as file:
        tensors = {tensor.name: file.get_tensor(tensor.name) for tensor in adapter.adapter_tensors(target)}
    return adapter.decode_factors(target, tensors, manifest.scaling)


def quantized_matrix(record: MatrixRecord) -> QuantizedMatrix:
    """The matrix with its grid, as the plan had it."""
    return QuantizedMatrix(record.tensor, record.module, record.kind, *record.shape, _grid(record), record.heads)  # type: ignore[arg-type]


def affine_values(grid: AffineGrid) -> dict[str, object]:
    """What a record keeps of an integer grid besides bits, group size and the two dtypes every grid has."""
    return {
        "zero": grid.zero,
        "zero_dtype": DTYPE_NAMES[grid.zero_dtype],
        "product_dtype": DTYPE_NAMES[grid.product_dtype],
        "least_zero": grid.least_zero,
        "scale_rule": grid.scale_rule,
    }


def _grid(record: MatrixRecord) -> Grid:
    scale_dtype, value_dtype = DTYPES[record.scale_dtype], DTYPES[record.value_dtype]
    if record.affine is None:
        book = codebook(record.data_type, record.bits)
        layout = cast("Layout", record.layout)
        return BlockGrid(book, record.block_size, layout, scale_dtype, value_dtype, record.nested)
    return AffineGrid(
        record.bits,
        record.block_size,
        record.affine["zero"],
        scale_dtype,
        value_dtype,
        DTYPES[record.affine["product_dtype"]],
        DTYPES[record.affine["zero_dtype"]],
        record.affine["scale_rule"],
        record.affine["least_zero"],
    )


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of the backbone by its name."""
    from safetensors import safe_open

    if (path / GGUF_FILE).exists():
        return _read_gguf(path / GGUF_FILE, name)
    index = path / _INDEX
    file = json.loads(index.read_bytes())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(path / file, framework="pt") as handle:
        return handle.get_tensor(name)


def _read_gguf(file: Path, name: str) -> Tensor:
    import torch
    from gguf import GGUFReader

    found = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == name)
    return torch.from_numpy(found.data.copy())
