"""Merge a QA-LoRA adapter into a GGUF file: packed 4-bit integers in groups of 32 become Q4_1 blocks, code by code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_cli.artifacts.decode import quantized_matrix
from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.errors import UsageError
from loftq_cli.formats.base import DTYPES, GridRequest, QuantizedMatrix, Refusal, Request, groups_of
from loftq_cli.formats.gguf.format import GgufFormat
from loftq_cli.formats.packed.format import PackedFormat
from loftq_cli.numerics.grids.affine import QuantizedGroups
from loftq_cli.numerics.grids.blocks import round_to
from loftq_cli.numerics.grids.grid import dequantize
from loftq_cli.numerics.lowrank.truncate import frobenius
from loftq_cli.tensorfile.layout import WeightFiles
from loftq_cli.tensorfile.tensors import OutputTensor

if TYPE_CHECKING:
    from loftq_cli.merging.job import Merge, Piece

_GGUF, _PACKED = GgufFormat(), PackedFormat()


def lay_out_gguf(job: Merge, pieces: Sequence[Piece], identity: str) -> WeightFiles:
    """Lay out the GGUF file.

    Raises:
        UsageError: GGUF cannot hold this model.
    """
    request = _request(job)
    matrices = [_blocks(job, record) for record in job.manifest.matrices]
    reason = _GGUF.refuse((), request) or _GGUF.refuse(matrices, request)
    if reason is not None:
        raise UsageError(f"--to gguf: {reason}.")
    outputs = [tensor for piece in pieces for tensor in piece.outputs]
    return WeightFiles((_GGUF.container(outputs, matrices, request, identity),), {})


def copied(tensor: OutputTensor) -> OutputTensor:
    """Return the output of a tensor in full precision, under GGUF's name."""
    return _GGUF.copied(tensor)


def blocks_of_record(job: Merge, record: MatrixRecord) -> tuple[OutputTensor, ...]:
    """Return the output tensors of a matrix."""
    return _GGUF.tensors(_blocks(job, record))


def into_gguf(job: Merge, piece: Piece) -> tuple[dict[str, Tensor], float]:
    """Keep the codes, and round scales and updated zeros to float16; return the tensors and their relative error
    against Q + ΔW."""
    assert piece.record is not None
    matrix, target = quantized_matrix(piece.record), _blocks(job, piece.record)
    groups = groups_of(_PACKED.unpack(matrix, job.checkpoint.read))
    assert groups.zeros is not None, "--to gguf requires float zeros"
    exact, zeros = dequantize(groups, matrix.grid), groups.zeros
    if piece.module is not None:
        exact += job.update(piece.module, matrix.in_features)
        compact = job.trained.compact(job.places[piece.module], matrix.in_features)
        zeros = zeros + compact.repeat_interleave(zeros.shape[1] // compact.shape[1], dim=1)
    half = torch.float16
    stored = QuantizedGroups(groups.codes, round_to(groups.scales, half), round_to(zeros, half))
    norm = frobenius(exact)
    error = frobenius(exact - dequantize(stored, target.grid)) / norm if norm else 0.0
    return _GGUF.encode(target, stored), error


def _request(job: Merge) -> Request:
    config = json.loads((job.source / "config.json").read_bytes())
    tokenizer = job.source / "tokenizer.json"
    return Request(
        job.manifest.task_type, config=config, tokenizer=tokenizer.read_bytes if tokenizer.is_file() else None
    )


def _blocks(job: Merge, record: MatrixRecord) -> QuantizedMatrix:
    """Return the matrix on Q4_1's grid.

    Raises:
        UsageError: GGUF cannot hold it.
    """
    matrix = quantized_matrix(record)
    asked = GridRequest(
        matrix.kind, *matrix.shape, 4, "int", 32, DTYPES[job.manifest.dtype], module=matrix.module, symmetric=False
    )
    grid = _GGUF.grid(asked)
    if isinstance(grid, Refusal):
        raise UsageError(f"--to gguf: {record.tensor} does not fit, {grid.reason}.")
    placed = QuantizedMatrix(matrix.tensor, matrix.module, matrix.kind, *matrix.shape, grid)
    return _GGUF.place(placed, _request(job))
