"""safetensors checkpoints, single or sharded, with or without an index.

File layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data;
offsets count from the end of the header, in order and without gaps (safetensors' own format document).
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.base import TORCH_DTYPES, TensorInfo
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.errors import LoftqError

_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """Implements `checkpoint.base.Checkpoint` over memory maps."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    fingerprint: str
    _maps: dict[str, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        mapped = self._map(info.file)
        view = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        tensor = view.clone().view(info.dtype).reshape(info.shape)
        del view
        # Give the pages back at once, so that resident memory does not grow with the checkpoint.
        first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, info.start + info.nbytes - first)
        return tensor

    def side_files(self) -> tuple[Path, ...]:
        return find_side_files(self.path)

    def close(self) -> None:
        while self._maps:
            self._maps.popitem()[1].close()

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with open(self.path / file, "rb") as handle:
                # A private mapping is writable, as torch wants its buffers; nothing ever writes to it.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def open_safetensors(directory: Path) -> SafetensorsCheckpoint:
    """Read config.json, the index and every shard's header; no weight.

    Raises:
        LoftqError: a file is missing, or headers, index and sizes contradict each other.
    """
    config = _read_json(directory / "config.json", "a Hugging Face checkpoint has one beside its weights")
    files, index = _find_files(directory)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        header, raw = _read_header(directory / file)
        digest.update(file.encode() + raw + str((directory / file).stat().st_size).encode())
        for info in header:
            if index is not None and index.get(info.name) not in (None, file):
                continue
            if info.name in tensors:
                raise LoftqError(f"tensor {info.name} is in both {tensors[info.name].file} and {file}: remove one.")
            tensors[info.name] = info
    for name, file in (index or {}).items():
        if name not in tensors:
            raise LoftqError(f"{directory / _INDEX} says {name} is in {file}, which does not hold it: download again.")
    return SafetensorsCheckpoint(directory, tensors, config, digest.hexdigest())


def _find_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shards in order, and the index's tensor → shard map where there is one."""
    if (directory / _INDEX).exists():
        index = _read_json(directory / _INDEX, "").get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise LoftqError(f"{directory / _INDEX} has no weight_map of names to files: download it again.")
        files = sorted(set(index.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise LoftqError(f"{directory / _INDEX} names {file!r}, which is no shard of this directory.")
            if not (directory / file).is_file():
                raise LoftqError(f"shard {file} of {directory} is missing: finish the download and try again.")
        return files, index
    if (directory / _SINGLE).is_file():
        return [_SINGLE], None
    files = sorted(
        p.name for p in directory.glob("*.safetensors") if not p.name.startswith(("adapter", "consolidated"))
    )
    if not files:
        raise LoftqError(f"{directory} holds no *.safetensors weights: give a directory with a safetensors checkpoint.")
    return files, None


def _read_header(path: Path) -> tuple[list[TensorInfo], bytes]:
    """The tensors of one file in the order of their bytes, and the raw header."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise LoftqError(f"{path} is no complete safetensors file: download it again.")
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items() if name[:2] != "__"]
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
    return tensors, raw


def _tensor_info(path: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
    if entry["dtype"] not in TORCH_DTYPES:
        raise LoftqError(f"tensor {name} in {path} has the unknown type {entry['dtype']!r}: convert it to BF16 first.")
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape of {name}")
    start, end = entry["data_offsets"]
    info = TensorInfo(name, TORCH_DTYPES[entry["dtype"]], shape, path.name, data + start)
    if end - start != info.nbytes:
        raise ValueError(f"{name} has {end - start} bytes for shape {list(shape)}")
    return info


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LoftqError(f"{path} is missing: {hint}.") from None
    except (ValueError, RecursionError) as error:
        raise LoftqError(f"{path} is no valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise LoftqError(f"{path} is no JSON object: download it again.")
    return content
