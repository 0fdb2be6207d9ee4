"""The interface that every source implements: read the headers first, then one tensor at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from loftq_cli.errors import LoftqError
from loftq_cli.tensorfile.dtypes import SAFETENSORS_NAMES
from loftq_cli.tensorfile.entry_names import entry_name, parse_entries

_NAMES_OF_SOURCE = frozenset({"_name_or_path", "transformers_version"})  # the origin of a copy, and its writer
_MOST_READ = 1 << 29  # bytes of a side file that may be held in memory
QUANTIZABLE = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class TensorInfo:
    """The location of one tensor: `nbytes` bytes from `start` in `file` (a name inside the checkpoint's directory).

    Tensors of one file with the same `start` are views of the same memory (tied weights in a pickle). A tensor that is
    computed while it is read has the dtype and shape of the result.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SideFile:
    """A file that accompanies the weights: `nbytes` is known up front; `open` reads or generates the content."""

    name: str
    nbytes: int
    open: Callable[[], BinaryIO]

    def read(self) -> bytes:
        """Return the whole content of a small file.

        Raises:
            LoftqError: it is too large to be held in memory.
        """
        with self.open() as handle:
            content = handle.read(_MOST_READ + 1)
        if len(content) > _MOST_READ:
            raise LoftqError(f"{self.name} has more than {_MOST_READ} bytes, too many for such a file: replace it.")
        return content


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Return one hash of everything a plan depends on: the config, and every tensor's name, dtype and shape.

    The hash does not depend on how tensors are distributed over files, on the file format or on the location, so that
    the same model produces the same output from every kind of source. It does not detect changed weights.
    """
    entries = sorted((name, SAFETENSORS_NAMES[info.dtype], list(info.shape)) for name, info in tensors.items())
    known = {name: value for name, value in config.items() if name not in _NAMES_OF_SOURCE}
    return hashlib.sha256(json.dumps([known, entries], sort_keys=True).encode()).hexdigest()


def name_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a sort key that orders `layers.10` after `layers.9`."""
    return tuple(
        (True, int(part), "") if part.isdecimal() else (False, 0, part) for part in re.split(r"(\d{1,18})", name)
    )


def entry(info: TensorInfo, index: int) -> TensorInfo:
    """Return the location, dtype and shape of one entry of a tensor's first dimension."""
    one = dataclasses.replace(info, name=entry_name(info.name, index), shape=info.shape[1:])
    return dataclasses.replace(one, start=info.start + index * one.nbytes)


def read_named(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return a tensor, or one entry of it if `name` is an entry's name such as `experts.down_proj[3]` (see `entry`).

    Raises:
        KeyError: the checkpoint does not contain the tensor.
    """
    if name in checkpoint.tensors:
        return checkpoint.read(name)
    found = parse_entries(name)
    if found is None:
        raise KeyError(name)
    return checkpoint.read_piece(found.whole, found.index)


class Checkpoint(Protocol):
    """An open source. `tensors` keeps the order of the files; `config` is config.json; `fingerprint` changes with any
    name, dtype, shape or config field."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as `tensors` describes it, in its own CPU memory."""

    def read_piece(self, name: str, index: int) -> torch.Tensor:
        """Return entry `index` of a tensor's first dimension without reading the others."""

    def side_files(self) -> tuple[SideFile, ...]:
        """Return the files that accompany the weights (tokenizer, licence …), copied or generated."""

    def cancel(self) -> None:
        """Abort reads in other threads that are waiting for the network."""

    def close(self) -> None:
        """Release files and memory."""
