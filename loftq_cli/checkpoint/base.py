"""The small interface every source has: headers first, then one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

# Names as safetensors writes them. Types torch cannot hold are copied as bytes and never quantized.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
QUANTIZABLE = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from `start` in `file` (a name inside the checkpoint's directory)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """An opened source. `tensors` keeps the order of the files; `config` is config.json; `fingerprint` changes with
    any header or size."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is on disk, in memory of its own on the CPU."""

    def side_files(self) -> tuple[Path, ...]:
        """Tokenizer, generation config, licence …: what is copied unchanged, relative to `path`."""

    def close(self) -> None:
        """Give the memory maps back."""
