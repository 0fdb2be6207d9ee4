"""safetensors checkpoints, single or sharded, with or without an index.

File layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data;
offsets count from the end of the header, in order and without gaps (safetensors' format specification).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch

from loftq_cli.checkpoint.base import SideFile, TensorInfo, entry, fingerprint
from loftq_cli.checkpoint.files import LocalFile
from loftq_cli.checkpoint.local import CONFIG_HINT, check_file, collect, find_files, read_index, read_json
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.errors import LoftqError
from loftq_cli.machine.regular_file import open_regular
from loftq_cli.tensorfile.dtypes import TORCH_DTYPES

_MAX_HEADER = 100_000_000  # the safetensors library's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "*.safetensors"
_MAX_DIMENSIONS = 64  # of a tensor in torch


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """Implements `checkpoint.base.Checkpoint` over files in a directory."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    fingerprint: str
    _files: dict[str, LocalFile] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        return self._read(self.tensors[name])

    def read_piece(self, name: str, index: int) -> torch.Tensor:
        return self._read(entry(self.tensors[name], index))

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        return self._file(info.file).read(info.start, info.nbytes).view(info.dtype).reshape(info.shape)

    def side_files(self) -> tuple[SideFile, ...]:
        return find_side_files(self.path)

    def cancel(self) -> None:
        """Do nothing: local reads do not wait for a network."""

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, name: str) -> LocalFile:
        return self._files.setdefault(name, LocalFile(self.path / name))


def has_safetensors(directory: Path) -> bool:
    """True if the directory contains files that `open_safetensors` reads."""
    return (directory / INDEX).exists() or bool(find_files(directory, SINGLE, SHARDS))


def open_safetensors(directory: Path) -> SafetensorsCheckpoint:
    """Read config.json, the index and every shard's header, but no weights.

    Raises:
        LoftqError: a file is missing, or the headers, index and sizes contradict each other.
    """
    config = read_json(directory / "config.json", CONFIG_HINT)
    files, index = _find_files(directory)
    infos = (info for file in files for info in _read_header(directory / file))
    tensors = collect(directory / INDEX, index, infos)
    return SafetensorsCheckpoint(directory, tensors, config, fingerprint(config, tensors))


def _find_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the shards in order, and the index's map of tensors to shards if there is an index."""
    if not (directory / SINGLE).exists() and (directory / INDEX).exists():  # transformers prefers the single file
        index = read_index(directory / INDEX, ".safetensors")
        return sorted(set(index.values())), index
    files = find_files(directory, SINGLE, SHARDS)
    if not files:
        raise LoftqError(f"{directory} contains no *.safetensors: give a directory with a safetensors checkpoint.")
    return files, None


def _read_header(path: Path) -> list[TensorInfo]:
    check_file(path)
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        return parse_header(path, handle.read(header_length(path, handle.read(8), size)), size)


def header_length(path: PurePath, start: bytes, size: int) -> int:
    """Return the length of the JSON header that follows the first 8 bytes of a file of `size` bytes.

    Raises:
        LoftqError: the header would not fit into the file.
    """
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
        raise LoftqError(f"{path} is not a complete safetensors file: download it again.")
    return length


def parse_header(path: PurePath, raw: bytes, size: int) -> list[TensorInfo]:
    """Return the tensors of one file in byte order; `path` is used for messages and for the file's name.

    Raises:
        LoftqError: the header is damaged or contradicts the file's size.
    """
    length = len(raw)
    try:
        header = json.loads(raw, object_pairs_hook=_reject_duplicates)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise LoftqError(f"the header of {path} is damaged ({error}): download the file again.") from error
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    position = 8 + length
    for info in tensors:
        if info.start != position:
            raise LoftqError(f"tensor {info.name} in {path} overlaps its neighbour or leaves a gap: download it again.")
        position += info.nbytes
    if position != size:
        raise LoftqError(f"{path} has {size} bytes but its header describes {position}: download it again.")
    return tensors


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it contains a name twice")
    return found


def _tensor_info(path: PurePath, name: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
    if entry["dtype"] not in TORCH_DTYPES:
        raise LoftqError(f"tensor {name} in {path} has the unknown type {entry['dtype']!r}: convert it to BF16 first.")
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    name.encode()  # JSON can contain lone surrogates, which cannot be encoded in files
    # `True` is an int to Python, and 8.0 equals 8.
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, start, end)):
        raise ValueError(f"invalid shape or offsets of {name}")
    # Even an empty tensor must have strides, and the product of very many sizes takes for ever.
    if len(shape) > _MAX_DIMENSIONS or prod(size for size in shape if size) >= 2**60:
        raise ValueError(f"invalid shape or offsets of {name}")
    info = TensorInfo(name, TORCH_DTYPES[entry["dtype"]], shape, path.name, data + start)
    if end - start != info.nbytes:
        raise ValueError(f"{name} has {end - start} bytes for shape {list(shape)}")
    return info
