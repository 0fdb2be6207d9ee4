"""The steps of a merge: how tensors of the result are computed from tensors of the backbone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from loftq_cli.artifacts.decode import as_described, quantized_matrix
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import KeptRecord, MatrixRecord
from loftq_cli.checkpoint import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.formats import get_format
from loftq_cli.formats.base import Format
from loftq_cli.kernels import block_quantizer
from loftq_cli.merging.into_gguf import blocks_of_record, copied, into_gguf
from loftq_cli.merging.job import Merge, Piece
from loftq_cli.merging.places import name_of_expert
from loftq_cli.numerics.lowrank.truncate import frobenius
from loftq_cli.tensorfile.dtypes import to_dtype
from loftq_cli.tensorfile.entry_names import whole_name
from loftq_cli.tensorfile.tensors import OutputTensor


def pieces_of(job: Merge) -> Iterator[Piece]:
    """Yield the backbone's tensors in their order; all tensors of a matrix come where its first one is."""
    container = get_format(job.manifest.format)
    owners: dict[str, list[MatrixRecord]] = defaultdict(list)
    for one in job.manifest.matrices:
        for tensor in as_described(job.source, one, partial(_stored, job, container, one)):
            owners[(tensor.whole or tensor).name].append(one)
    kept: dict[str, list[KeptRecord]] = defaultdict(list)
    for record in job.manifest.kept:
        whole = _whole(job, record.tensor)
        if whole not in job.checkpoint.tensors:
            raise LoftqError(
                f"{job.source / MANIFEST} lists the tensor {record.tensor!r:.200}, which the weight files do not hold: "
                "restore that file, or convert the model again."
            )
        kept[whole].append(record)
    seen = set()
    for name, info in job.checkpoint.tensors.items():
        if name not in owners:
            yield from _kept_pieces(job, info, kept.get(name, []))
            continue
        for one in owners[name]:
            if one.tensor not in seen:
                seen.add(one.tensor)
                yield _quantized_piece(job, one)
    for one_saved in job.saved.values():
        if one_saved.before is None:
            dtype = job.dtype if one_saved.dtype.is_floating_point else one_saved.dtype
            yield Piece(None, (), (OutputTensor(one_saved.tensor, dtype, one_saved.shape),), None)


def _stored(job: Merge, container: Format, record: MatrixRecord) -> tuple[OutputTensor, ...]:
    """Return the tensors that hold a matrix.

    Raises:
        ValueError: the weight files do not hold them as the record describes them.
    """
    tensors = container.tensors(quantized_matrix(record))
    for tensor in tensors:
        expected = tensor.whole or tensor
        found = job.checkpoint.tensors.get(expected.name)
        if found is None:
            raise ValueError(f"there is no {expected.name}")
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            raise ValueError(
                f"{expected.name} is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
            )
    return tensors


def _whole(job: Merge, name: str) -> str:
    """Return the name of the stored tensor; an entry of it, one expert, ends in the expert's number."""
    return name if name in job.checkpoint.tensors else whole_name(name)


def _quantized_piece(job: Merge, record: MatrixRecord) -> Piece:
    matrix = quantized_matrix(record)
    outputs = inputs = get_format(job.manifest.format).tensors(matrix)
    if job.way == "gguf":
        outputs = blocks_of_record(job, record)
    elif job.way == "dense":
        saved = job.saved.get(record.tensor)
        shape = matrix.orientation.turn_shape(matrix.shape) if saved is None else saved.shape
        dtype = torch.float32 if matrix.tensor in job.float32 else job.dtype
        outputs = (matrix.stored(matrix.tensor, dtype, shape),)
    module = record.module if record.module in job.places else None
    return Piece(record, tuple(tensor.name for tensor in inputs), outputs, module)


def _kept_pieces(job: Merge, info: TensorInfo, records: list[KeptRecord]) -> Iterator[Piece]:
    """Yield a tensor in full precision; if it holds experts, one of them after the other."""
    cast = job.cast and job.way == "dense" and info.dtype.is_floating_point and info.name not in job.float32
    saved = job.saved.get(info.name)
    output = OutputTensor(info.name, job.dtype if cast else info.dtype, info.shape if saved is None else saved.shape)
    output = copied(output) if job.way == "gguf" else output
    if not records:
        yield Piece(None, (info.name,), (output,), None)
    for record in records:
        expert = record.expert
        module = record.module if expert is None else name_of_expert(record)
        module = module if module in job.places else None
        one = output if record.tensor == info.name or expert is None else output.piece(expert.index)
        yield Piece(None, (record.tensor,), (one,), module, record.orientation)


def merge_piece(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of a piece, and their relative error against Q + ΔW."""
    if piece.record is None:
        return _into_full_precision(job, piece)
    if job.way == "gguf":
        return into_gguf(job, piece)
    if piece.module is None and job.way != "dense":
        return {name: job.read(name) for name in piece.inputs}, 0.0
    if job.way == "zeros":
        return _into_zeros(job, piece)
    matrix = quantized_matrix(piece.record)
    container = get_format(job.manifest.format)
    exact = _trained_matrix(job, piece.record)
    if piece.module is not None:
        exact += job.update(piece.module, matrix.in_features)
    _check_finite(exact, piece.record.tensor)
    if job.way == "requantize":
        step = block_quantizer(matrix.grid, exact.device).quantize_residual(exact, exact)
        norm = frobenius(exact)
        encoded = container.encode(matrix, step.quantized)
        return {name: value.cpu() for name, value in encoded.items()}, step.residual_norm() / norm if norm else 0.0
    (output,) = piece.outputs
    stored = to_dtype(exact, output.dtype, output.name)
    error = _relative(exact, stored.float())
    return {output.name: matrix.orientation.turn(stored).contiguous()}, error


def _into_full_precision(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    (output,) = piece.outputs
    weight = _trained_tensor(job, piece)
    if piece.module is None:
        return {output.name: to_dtype(weight, output.dtype, output.name)}, 0.0
    _, n_in = piece.orientation.turn_shape((weight.shape[0], weight.shape[1]))
    exact = weight.float() + piece.orientation.turn(job.update(piece.module, n_in))
    stored = to_dtype(exact, output.dtype, output.name)
    return {output.name: stored}, _relative(exact, stored.float())


def _trained_tensor(job: Merge, piece: Piece) -> Tensor:
    """Return a tensor in full precision without its update: the adapter's own, or the backbone's."""
    name = piece.inputs[0] if piece.inputs else piece.outputs[0].name
    saved = job.saved.get(name)
    weight = job.read(name) if saved is None or saved.key is None else None
    weight = weight if saved is None else saved.apply(job.trained, weight)
    assert weight is not None
    return weight


def _trained_matrix(job: Merge, record: MatrixRecord) -> Tensor:
    """Return a quantized matrix without its update, float32 [out, in]: the adapter's own, or the backbone's Q."""
    saved = job.saved.get(record.tensor)
    matrix, container = quantized_matrix(record), get_format(job.manifest.format)
    weight = None
    if saved is None or saved.key is None:
        weight = as_described(job.source, record, lambda: container.decode(matrix, job.read))
    if saved is None:
        assert weight is not None
        return weight
    stored = None if weight is None else record.orientation.turn(weight)
    return record.orientation.turn(saved.apply(job.trained, stored)).float().contiguous()


def _check_finite(exact: Tensor, name: str) -> None:
    if not torch.isfinite(exact).all():
        raise LoftqError(
            f"{name} would contain NaN or infinity after the merge: look at the adapter's lora_alpha and factors."
        )


def _into_zeros(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    """Add the update to its groups' zeros (the value of code 0) and keep everything else."""
    assert piece.record is not None and piece.module is not None
    matrix, container = quantized_matrix(piece.record), get_format(job.manifest.format)
    tensors = {name: job.read(name) for name in piece.inputs}
    exact = as_described(job.source, piece.record, lambda: container.decode(matrix, tensors.__getitem__))
    exact += job.update(piece.module, matrix.in_features)
    _check_finite(exact, piece.record.tensor)
    compact = job.trained.compact(job.places[piece.module], matrix.in_features)
    name = f"{matrix.prefix}.weight_zeros"
    zeros = tensors[name]
    tensors[name] = zeros + compact.repeat_interleave(zeros.shape[1] // compact.shape[1], dim=1)
    return tensors, _relative(exact, container.decode(matrix, tensors.__getitem__))


def _relative(exact: Tensor, stored: Tensor) -> float:
    norm = frobenius(exact)
    return frobenius(exact - stored) / norm if norm else 0.0
