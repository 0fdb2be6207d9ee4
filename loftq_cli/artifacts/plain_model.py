"""Describe a model that is no conversion from its headers: merged by loftq, or never converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from loftq_cli.checkpoint import Checkpoint, open_source
from loftq_cli.checkpoint.base import name_order
from loftq_cli.checkpoint.local import read_json
from loftq_cli.checkpoint.quantized import quantization_method
from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import user_path
from loftq_cli.recipe.model import Recipe
from loftq_cli.tensorfile.dtypes import SAFETENSORS_NAMES

MERGE_RECORD = "loftq_merge.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored; `dtype` as safetensors writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True)
class PlainModel:
    """What the headers of a model tell.

    Attributes:
        dtype: of most of its numbers.
        quantization: the method that another tool quantized it with; None if it is not quantized.
        merge: `loftq_merge.json` of a merged model, or None.
        parameters: numbers in all tensors; packed ones count as they are stored.
    """

    model: str
    architecture: str | None
    dtype: str
    quantization: str | None
    merge: Mapping[str, Any] | None
    files: int
    parameters: int
    nbytes: int
    tensors: tuple[StoredTensor, ...]


def describe_model(model: str) -> PlainModel:
    """Read the headers of a directory, or of `org/name` on the Hub, and no weights.

    Raises:
        LoftqError: it does not exist, holds no weights that loftq reads, or its headers are damaged.
    """
    with open_source(Recipe(model), weights=False) as (checkpoint, _):
        ordered = sorted(checkpoint.tensors.values(), key=lambda info: name_order(info.name))
        tensors = tuple(
            StoredTensor(info.name, SAFETENSORS_NAMES[info.dtype], info.shape, info.nbytes, info.file)
            for info in ordered
        )
        names = checkpoint.config.get("architectures")
        record = user_path(model) / MERGE_RECORD
        weighed: Counter[str] = Counter()
        for tensor in tensors:
            weighed[tensor.dtype] += tensor.nbytes
        return PlainModel(
            model=model,
            architecture=names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None,
            dtype=weighed.most_common(1)[0][0] if weighed else "",
            quantization=quantization_method(checkpoint),
            merge=read_json(record, "") if record.is_file() else None,
            files=len({tensor.file for tensor in tensors}),
            parameters=sum(prod(tensor.shape) for tensor in tensors),
            nbytes=sum(tensor.nbytes for tensor in tensors),
            tensors=tensors,
        )


def unreadable(checkpoint: Checkpoint, name: str) -> str | None:
    """Return what is wrong with a tensor, or None if it can be read and its numbers are finite."""
    import torch

    try:
        tensor = checkpoint.read(name)
    except (LoftqError, OSError, ValueError, RuntimeError) as error:
        return f"cannot be read ({' '.join(f'{type(error).__name__}: {error}'.split()):.200})"
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        return "contains NaN or infinity"
    return None
