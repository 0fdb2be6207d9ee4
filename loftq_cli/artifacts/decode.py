"""Read Q of one matrix back from an output directory, with the container's own decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loftq_cli.artifacts import tensor_reader
from loftq_cli.artifacts.manifest import NAME, AffineRecord, Manifest, MatrixRecord, read_manifest
from loftq_cli.errors import LoftqError
from loftq_cli.formats import adapter, container_in, get_container, get_format
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, QuantizedMatrix
from loftq_cli.numerics.grids.affine import AffineGrid, ScaleRule, Zero
from loftq_cli.numerics.grids.blocks import BlockGrid, Layout
from loftq_cli.numerics.grids.codebooks import TRELLIS, codebook
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.tensorfile.entry_names import parse_entries, whole_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Decoding by a record that does not match the files raises these; a manifest can claim anything.
_MISFITS = (LoftqError, KeyError, IndexError, ValueError, RuntimeError, ArithmeticError, TypeError, AssertionError)


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
    container = get_format(manifest.format)

    def decode() -> Tensor:
        matrix = quantized_matrix(record)
        expected = {tensor.name: tensor for tensor in container.tensors(matrix)}

        def read(name: str) -> Tensor:
            found, wanted = read_tensor(path, name), expected.get(name)
            if wanted is not None and not get_container(manifest.format).file:
                _check_stored(name, (found.dtype, tuple(found.shape)), (wanted.dtype, wanted.shape))
            return found

        return container.decode(matrix, read)

    return as_described(path, record, decode)


def _check_stored(
    name: str, found: tuple[torch.dtype, tuple[int, ...]], wanted: tuple[torch.dtype, tuple[int, ...]]
) -> None:
    if found != wanted:
        raise ValueError(f"{name} is {found[0]} {list(found[1])}, not {wanted[0]} {list(wanted[1])}")


def as_described(path: Path, record: MatrixRecord, decode: Callable[[], T]) -> T:
    """Return what `decode` returns for a record.

    Raises:
        LoftqError: it fails, because the record does not describe what the files hold.
    """
    try:
        return decode()
    except _MISFITS as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        if isinstance(error, LoftqError):  # whose advice comes after the last colon
            reason = reason.rpartition(": ")[0]
        raise LoftqError(
            f"{path / NAME} does not describe {record.tensor} as the weight files hold it ({reason:.200}): restore "
            "that file, or convert the model again."
        ) from error


def decode_product(path: Path, manifest: Manifest, record: MatrixRecord) -> Tensor:
    """Return scaling · BA of a matrix with an adapter, float32 [out, in]."""
    b, a = read_factors(path, manifest, record)
    return b @ a


def read_factors(path: Path, manifest: Manifest, record: MatrixRecord) -> tuple[Tensor, Tensor]:
    """Return B [out, r] and A [r, in] of a matrix with an adapter, float32; PEFT adds their product to the weight."""
    return as_described(path, record, lambda: _read_factors(path, manifest, record))


def _read_factors(path: Path, manifest: Manifest, record: MatrixRecord) -> tuple[Tensor, Tensor]:
    target = adapter.AdapterTarget(
        record.module, record.kind, *record.shape, record.rank, record.parameter, record.expert, manifest.pooling
    )
    first, second = adapter.adapter_tensors(target)
    joint = adapter.joint_b(target)
    file = path / adapter.WEIGHTS
    if joint is None:
        lora_b = _read(file, second.name)
    else:
        begin = target.expert.part * target.out_features if target.expert else 0
        info = tensor_reader.find_tensor(file, joint.name)
        rows = tensor_reader.read_tensor(file, info, begin, begin + target.out_features)
        lora_b = adapter.own_columns(target, rows)
    tensors = {first.name: _read(file, first.name), second.name: lora_b}
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
    if record.affine is None and record.data_type in TRELLIS:
        return TrellisGrid(record.bits, TRELLIS[record.data_type], record.block_size, scale_dtype, value_dtype)
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
    container = container_in(path)
    if container is not None:
        return get_format(container.name).read_tensor(path / container.file, name)
    return _read(tensor_reader.shard_of(path, whole_name(name)), name)


def _read(file: Path, name: str) -> Tensor:
    """Read a tensor of a file, or one entry or a range of entries of it (`experts.down_proj[3]`)."""
    piece = parse_entries(name)
    if piece is None:
        return tensor_reader.read_tensor(file, tensor_reader.find_tensor(file, name))
    info = tensor_reader.find_tensor(file, piece.whole)
    if piece.end is None:
        return tensor_reader.read_tensor(file, info, piece.index, piece.index + 1)[0]
    return tensor_reader.read_tensor(file, info, piece.index, piece.end)
