"""safetensors files laid out before their content exists: the plan is the header.

Every tensor's place follows from names, dtypes and shapes alone, so that results can be written in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.base import SAFETENSORS_NAMES

if TYPE_CHECKING:
    from loftq_cli.formats.base import OutputTensor  # whose package imports this module


@dataclass(frozen=True)
class TensorFile:
    """One file of tensors: `header` is everything before the data; `starts` are absolute byte positions by name."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    starts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        ends = (self.starts[tensor.name] + tensor.nbytes for tensor in self.tensors)
        return max(ends, default=len(self.header))


def lay_out(name: str, tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> TensorFile:
    """Place tensors as the safetensors library does: wide dtypes first (which aligns all), then by name."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts, position = {}, len(header)
    for tensor in ordered:
        starts[tensor.name] = position
        position += tensor.nbytes
    return TensorFile(name, header, ordered, starts)


def shard(groups: Iterable[tuple[OutputTensor, ...]], max_bytes: int) -> list[list[OutputTensor]]:
    """Fill shards in order without parting a group; a group above `max_bytes` gets a shard of its own."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Hugging Face's own names."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
