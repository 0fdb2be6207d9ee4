"""safetensors checkpoints, single or sharded, with or without an index.

File layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data;
offsets count from the end of the header, in order and without gaps (safetensors' own format document).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch

from loftq_cli.checkpoint.base import SideFile, TensorInfo, entry, fingerprint
from loftq_cli.checkpoint.local import CONFIG_HINT, check_file, collect, find_files, read_index, read_json
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.errors import LoftqError
from loftq_cli.tensorfile.dtypes import TORCH_DTYPES

_MAX_HEADER = 100_000_000  # the safetensors library's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "*.safetensors"
_PIECE = 16 << 20  # bytes that are mapped and copied at a time


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """Implements `checkpoint.base.Checkpoint` over memory maps."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    fingerprint: str
    _maps: dict[str, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        return self._read(self.tensors[name])

    def read_piece(self, name: str, index: int) -> torch.Tensor:
        return self._read(entry(self.tensors[name], index))

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        mapped, copy = self._map(info.file), torch.empty(info.nbytes, dtype=torch.uint8)
        for done in range(0, info.nbytes, _PIECE):
            count, offset = min(_PIECE, info.nbytes - done), info.start + done
            copy[done : done + count] = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=offset)
            # Give the pages back at once, so that resident memory does not grow with the tensor or the checkpoint.
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, offset + count - first)
        return copy.view(info.dtype).reshape(info.shape)

    def side_files(self) -> tuple[SideFile, ...]:
        return find_side_files(self.path)

    def cancel(self) -> None:
        """Nothing waits for a network."""

    def close(self) -> None:
        while self._maps:
            self._maps.popitem()[1].close()

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with open(self.path / file, "rb") as handle:
                # A private mapping is writable, as torch wants its buffers; nothing ever writes to it.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def has_safetensors(directory: Path) -> bool:
    """Whether there is something for `open_safetensors`."""
    return (directory / INDEX).exists() or bool(find_files(directory, SINGLE, SHARDS))


def open_safetensors(directory: Path) -> SafetensorsCheckpoint:
    """Read config.json, the index and every shard's header; no weight.

    Raises:
        LoftqError: a file is missing, or headers, index and sizes contradict each other.
    """
    config = read_json(directory / "config.json", CONFIG_HINT)
    files, index = _find_files(directory)
    infos = (info for file in files for info in _read_header(directory / file))
    tensors = collect(directory / INDEX, index, infos)
    return SafetensorsCheckpoint(directory, tensors, config, fingerprint(config, tensors))


def _find_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shards in order, and the index's tensor → shard map where there is one."""
    if not (directory / SINGLE).exists() and (directory / INDEX).exists():  # transformers prefers the single file
        index = read_index(directory / INDEX, ".safetensors")
        return sorted(set(index.values())), index
    files = find_files(directory, SINGLE, SHARDS)
    if not files:
        raise LoftqError(f"{directory} holds no *.safetensors weights: give a directory with a safetensors checkpoint.")
    return files, None


def _read_header(path: Path) -> list[TensorInfo]:
    check_file(path)
    size = path.stat().st_size
    with open(path, "rb") as handle:
        return parse_header(path, handle.read(header_length(path, handle.read(8), size)), size)


def header_length(path: PurePath, start: bytes, size: int) -> int:
    """The length of the JSON header that follows the first 8 bytes of a file of `size` bytes.

    Raises:
        LoftqError: the file cannot hold such a header.
    """
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
        raise LoftqError(f"{path} is no complete safetensors file: download it again.")
    return length


def parse_header(path: PurePath, raw: bytes, size: int) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes; `path` is for messages and the file's name.

    Raises:
        LoftqError: the header is damaged or contradicts the file's size.
    """
    length = len(raw)
    try:
        header = json.loads(raw, object_pairs_hook=_without_doubles)
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
        raise LoftqError(f"{path} is {size} bytes long but its header tells {position}: download it again.")
    return tensors


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _tensor_info(path: PurePath, name: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
    if entry["dtype"] not in TORCH_DTYPES:
        raise LoftqError(f"tensor {name} in {path} has the unknown type {entry['dtype']!r}: convert it to BF16 first.")
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    name.encode()  # JSON can hold halves of characters, files cannot
    # `True` is an int to Python, and 8.0 equals 8.
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, start, end)):
        raise ValueError(f"shape or place of {name}")
    info = TensorInfo(name, TORCH_DTYPES[entry["dtype"]], shape, path.name, data + start)
    if end - start != info.nbytes:
        raise ValueError(f"{name} has {end - start} bytes for shape {list(shape)}")
    return info
