"""Read single tensors of safetensors files without parsing a file's header again for each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from loftq_cli.checkpoint import TensorInfo
from loftq_cli.checkpoint.local import check_file, read_index
from loftq_cli.checkpoint.safetensors import INDEX, header_length, parse_header
from loftq_cli.errors import LoftqError
from loftq_cli.machine.regular_files import open_regular

_FILES = 64  # headers that are kept, so that a model of many shards is read in order without parsing one twice


def tensors_of(path: Path) -> Mapping[str, TensorInfo]:
    """Return the tensors of a file by name, parsed once for as long as the file does not change.

    Raises:
        LoftqError: the file is missing or damaged, or a link that leads elsewhere.
    """
    try:
        check_file(path)
        return _tensors_of(path, _identity(path))
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror or 'it is missing'}): restore that file.") from error


def find_tensor(path: Path, name: str) -> TensorInfo:
    """Return the description of one tensor.

    Raises:
        LoftqError: the file has no such tensor, or cannot be read.
    """
    found = tensors_of(path).get(name)
    if found is None:
        raise LoftqError(f"{path} has no tensor {name!r:.200}: restore that file.")
    return found


def read_tensor(path: Path, info: TensorInfo, begin: int = 0, end: int | None = None) -> Tensor:
    """Read a tensor of a file, or its rows from `begin` to `end`, into memory of its own.

    Raises:
        LoftqError: the rows do not exist, or the file has become shorter.
    """
    shape = info.shape
    if begin or end is not None:
        count = info.shape[0] if info.shape else 0
        end = count if end is None else end
        if not 0 <= begin <= end <= count:
            raise LoftqError(f"{info.name} in {path} has no rows {begin} to {end}, only {count}: restore that file.")
        shape = (end - begin, *info.shape[1:])
    row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
    content = torch.empty(shape, dtype=info.dtype)
    if content.numel() == 0:
        return content
    view = content.reshape(-1).view(torch.uint8).numpy().data
    with open_regular(path) as file:
        file.seek(info.start + begin * row)
        if file.readinto(view) != view.nbytes:
            raise LoftqError(f"{path} ends before {info.name} does: restore that file.")
    return content


def shard_of(folder: Path, name: str) -> Path:
    """Return the file of a model's folder that holds a tensor, by the index if there is one.

    Raises:
        LoftqError: the index is damaged or does not list the tensor.
    """
    index = folder / INDEX
    if not index.exists():
        return folder / "model.safetensors"
    found = _shards_of(index, _identity(index)).get(name)
    if found is None:
        raise LoftqError(f"{index} does not list the tensor {name!r:.200}: restore that file.")
    return folder / found


def _identity(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=_FILES)
def _tensors_of(path: Path, identity: tuple[int, ...]) -> Mapping[str, TensorInfo]:
    size = identity[2]
    with open_regular(path) as file:
        header = file.read(header_length(path, file.read(8), size))
    return MappingProxyType({info.name: info for info in parse_header(path, header, size)})


@lru_cache(maxsize=4)
def _shards_of(index: Path, identity: tuple[int, ...]) -> Mapping[str, str]:
    return MappingProxyType(read_index(index, ".safetensors"))
