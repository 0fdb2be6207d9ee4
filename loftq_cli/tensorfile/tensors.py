"""The contents of output files, before any of it is computed: tensors, pieces of tensors, and their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from loftq_cli.tensorfile.entry_names import entries_name, entry_name


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an output file, or a piece of one, as known before any weight is read.

    Attributes:
        whole: the tensor that this is a piece of; None for a tensor.
        offset: bytes from the beginning of `whole` to this piece.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: OutputTensor | None = None
    offset: int = 0

    def piece(self, index: int) -> OutputTensor:
        """Return one entry of the first dimension."""
        return OutputTensor(entry_name(self.name, index), self.dtype, self.shape[1:], self, index * self.row_bytes)

    def rows(self, first: int, count: int) -> OutputTensor:
        """Return `count` entries of the first dimension."""
        name, shape = entries_name(self.name, first, count), (count, *self.shape[1:])
        return OutputTensor(name, self.dtype, shape, self, first * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """Bytes of a file that one unit writes; `name` is "" for bytes that no unit writes and that stay zero."""

    name: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors.

    Attributes:
        header: the bytes before the data.
        starts: absolute byte position of each tensor, and of each piece that units write, by name.
    """

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    starts: Mapping[str, int]
    pieces: tuple[OutputTensor, ...] = ()

    def spans(self, tensor: OutputTensor) -> list[Span]:
        """Return the span of `tensor`, or of its pieces and the gaps between them, in the order of their bytes."""
        pieces = sorted(
            ((self.starts[p.name], p) for p in self.pieces if p.whole and p.whole.name == tensor.name),
            key=lambda pair: pair[0],
        )
        position, end, found = self.starts[tensor.name], self.starts[tensor.name] + tensor.nbytes, []
        for start, piece in pieces:
            if start > position:
                found.append(Span("", position, start - position))
            found.append(Span(piece.name, start, piece.nbytes))
            position = start + piece.nbytes
        if not pieces:
            return [Span(tensor.name, position, tensor.nbytes)]
        return [*found, Span("", position, end - position)] if position < end else found

    @property
    def nbytes(self) -> int:
        ends = (self.starts[tensor.name] + tensor.nbytes for tensor in self.tensors)
        return max(ends, default=len(self.header))
