"""Lay out safetensors files before their content exists.

The position of every tensor follows from names, dtypes and shapes alone, so results can be written in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loftq_cli.tensorfile.dtypes import SAFETENSORS_NAMES
from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile


def lay_out(name: str, tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> TensorFile:
    """Place tensors as the safetensors library does: wide dtypes first (which aligns every tensor), then by name."""
    given = list(tensors)
    pieces = tuple(tensor for tensor in given if tensor.whole is not None)
    ordered = tuple(sorted(wholes(given), key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)))
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
    starts |= {piece.name: starts[piece.whole.name] + piece.offset for piece in pieces if piece.whole}
    return TensorFile(name, header, ordered, starts, pieces)


@dataclass(frozen=True)
class WeightFiles:
    """The files of a backbone, laid out.

    Attributes:
        index: the file of each tensor, by name; empty for a single file, which needs no index.
    """

    files: tuple[TensorFile, ...]
    index: Mapping[str, str]


def lay_out_shards(
    groups: Iterable[tuple[OutputTensor, ...]], max_bytes: int, metadata: Mapping[str, str]
) -> WeightFiles:
    """Distribute tensors over safetensors files of at most `max_bytes`, named as Hugging Face names them."""
    shards = shard(groups, max_bytes)
    files = tuple(lay_out(name, tensors, metadata) for name, tensors in zip(shard_names(len(shards)), shards))
    index = {tensor.name: file.name for file in files for tensor in file.tensors}
    return WeightFiles(files, index if len(files) > 1 else {})


def backbone_metadata(fingerprint: str) -> dict[str, str]:
    """Return the metadata of a weight file: what transformers requires, and what the file was made from."""
    return {"format": "pt", "loftq_fingerprint": fingerprint}


def wholes(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """Return the tensors in a file's header: each once, even if it is written in pieces."""
    return list({whole.name: whole for whole in (tensor.whole or tensor for tensor in tensors)}.values())


def shard(groups: Iterable[tuple[OutputTensor, ...]], max_bytes: int) -> list[list[OutputTensor]]:
    """Fill shards in order without splitting a group; a group above `max_bytes` gets a shard of its own. All pieces of
    a tensor go to the shard of the first one."""
    shards: list[list[OutputTensor]] = [[]]
    homes: dict[str, list[OutputTensor]] = {}
    filled = 0
    for group in groups:
        new = [tensor for tensor in wholes(group) if tensor.name not in homes]
        size = sum(tensor.nbytes for tensor in new)
        if new and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        homes |= {tensor.name: shards[-1] for tensor in new}
        for tensor in group:
            homes[(tensor.whole or tensor).name].append(tensor)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Return the file names that Hugging Face libraries use."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
