"""The steps of a merge: how tensors of the result are computed from tensors of the backbone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor

from loftq_cli.artifacts.decode import quantized_matrix
from loftq_cli.artifacts.manifest import KeptRecord, MatrixRecord
from loftq_cli.checkpoint import TensorInfo
from loftq_cli.formats import get_format
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
        for tensor in container.tensors(quantized_matrix(one)):
            owners[(tensor.whole or tensor).name].append(one)
    kept: dict[str, list[KeptRecord]] = defaultdict(list)
    for record in job.manifest.kept:
        kept[_whole(job, record.tensor)].append(record)
    seen = set()
    for name, info in job.checkpoint.tensors.items():
        if name not in owners:
            yield from _kept_pieces(job, info, kept.get(name, []))
            continue
        for one in owners[name]:
            if one.tensor not in seen:
                seen.add(one.tensor)
                yield _quantized_piece(job, one)


def _whole(job: Merge, name: str) -> str:
    """Return the name of the stored tensor; an entry of it, one expert, ends in the expert's number."""
    return name if name in job.checkpoint.tensors else whole_name(name)


def _quantized_piece(job: Merge, record: MatrixRecord) -> Piece:
    matrix = quantized_matrix(record)
    outputs = inputs = get_format(job.manifest.format).tensors(matrix)
    if job.way == "gguf":
        outputs = blocks_of_record(job, record)
    elif job.way == "dense":
        outputs = (matrix.stored(matrix.tensor, job.dtype, matrix.orientation.turn_shape(matrix.shape)),)
    module = record.module if record.module in job.places else None
    return Piece(record, tuple(tensor.name for tensor in inputs), outputs, module)


def _kept_pieces(job: Merge, info: TensorInfo, records: list[KeptRecord]) -> Iterator[Piece]:
    """Yield a tensor in full precision; if it holds experts, one of them after the other."""
    cast = job.cast and job.way == "dense" and info.dtype.is_floating_point and info.name not in job.float32
    output = OutputTensor(info.name, job.dtype if cast else info.dtype, info.shape)
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
    exact = container.decode(matrix, job.read)
    if piece.module is not None:
        exact += job.update(piece.module, matrix.in_features)
    if job.way == "requantize":
        step = block_quantizer(matrix.grid, exact.device).quantize_residual(exact, exact)
        norm = frobenius(exact)
        encoded = container.encode(matrix, step.quantized)
        return {name: value.cpu() for name, value in encoded.items()}, step.residual_norm() / norm if norm else 0.0
    stored = to_dtype(exact, job.dtype, piece.record.tensor)
    error = _relative(exact, stored.float())
    (output,) = piece.outputs
    return {output.name: matrix.orientation.turn(stored).contiguous()}, error


def _into_full_precision(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    (output,) = piece.outputs
    weight = job.read(piece.inputs[0])
    if piece.module is None:
        return {output.name: to_dtype(weight, output.dtype, piece.inputs[0])}, 0.0
    _, n_in = piece.orientation.turn_shape((weight.shape[0], weight.shape[1]))
    exact = weight.float() + piece.orientation.turn(job.update(piece.module, n_in))
    stored = to_dtype(exact, output.dtype, piece.inputs[0])
    return {output.name: stored}, _relative(exact, stored.float())


def _into_zeros(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    """Add the update to its groups' zeros (the value of code 0) and keep everything else."""
    assert piece.record is not None and piece.module is not None
    matrix, container = quantized_matrix(piece.record), get_format(job.manifest.format)
    tensors = {name: job.read(name) for name in piece.inputs}
    exact = container.decode(matrix, tensors.__getitem__) + job.update(piece.module, matrix.in_features)
    compact = job.trained.compact(job.places[piece.module], matrix.in_features)
    name = f"{matrix.prefix}.weight_zeros"
    zeros = tensors[name]
    tensors[name] = zeros + compact.repeat_interleave(zeros.shape[1] // compact.shape[1], dim=1)
    return tensors, _relative(exact, container.decode(matrix, tensors.__getitem__))


def _relative(exact: Tensor, stored: Tensor) -> float:
    norm = frobenius(exact)
    return frobenius(exact - stored) / norm if norm else 0.0
