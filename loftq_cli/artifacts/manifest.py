"""`loftq.json`: what was done to every matrix, what every file must hash to, and the totals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.errors import LoftqError

NAME = "loftq.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class MatrixRecord:
    """One quantized matrix. Residuals are ‖W - Q - BA‖_F / ‖W‖_F.

    Where it was calibrated, the weighted ones are ‖(W - Q - BA) R‖_F / ‖W R‖_F with R Rᵀ the second moment of the
    layer's inputs (`numerics.weighted`), and the best step is the one with the smallest of these.

    Attributes:
        shape: [out, in] as the layer computes, whatever the orientation on disk.
        layout, scale_dtype, value_dtype: the container's grid (`numerics.blocks.BlockGrid`).
        plain_residual: without an adapter and without iterations, what quantization alone leaves.
        residuals: after each LoftQ step; empty for QLoRA. `best`: the step that was kept, from 1; 0 for none.
    """

    tensor: str
    module: str
    kind: str
    shape: tuple[int, int]
    bits: int
    data_type: str
    block_size: int
    layout: str
    scale_dtype: str
    value_dtype: str
    rank: int
    plain_residual: float
    residual: float
    residuals: tuple[float, ...]
    best: int
    seconds: float
    backbone_bytes: int
    adapter_bytes: int
    weighted_plain_residual: float | None = None
    weighted_residual: float | None = None


@dataclass(frozen=True)
class KeptRecord:
    """A tensor left in full precision, and why; `rank` > 0 where it got an adapter that starts at zero."""

    tensor: str
    module: str | None
    kind: str
    shape: tuple[int, ...]
    reason: str
    rank: int
    nbytes: int


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one output file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Totals:
    """Sums and means over the quantized matrices (means unweighted); bytes of all tensors."""

    matrices: int
    source_bytes: int
    backbone_bytes: int
    adapter_bytes: int
    quantized_weights: int
    bits_effective: float
    bits_stored: float
    plain_residual: float
    residual: float
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The whole record of one conversion.

    Attributes:
        source, source_revision: the id of a model on the Hub and its commit; or a directory and None.
    """

    manifest_version: int
    versions: Mapping[str, str]
    fingerprint: str
    output: str
    source: str
    source_revision: str | None
    source_fingerprint: str
    architecture: str | None
    model_type: str | None
    task_type: str | None
    format: str
    dtype: str
    scaling: float
    device: str
    recipe: Mapping[str, Any]
    totals: Totals
    notes: tuple[str, ...]
    files: Mapping[str, FileRecord]
    matrices: tuple[MatrixRecord, ...]
    kept: tuple[KeptRecord, ...]

    def matrix(self, name: str) -> MatrixRecord:
        """The record of a module path or a tensor name.

        Raises:
            LoftqError: no quantized matrix has that name.
        """
        for record in self.matrices:
            if name in (record.module, record.tensor):
                return record
        raise LoftqError(f"no quantized matrix is called {name}: `loftq inspect` lists them.")


def render(manifest: Manifest) -> bytes:
    """JSON with one matrix, kept tensor or file a line, so that a person can read it and grep it."""
    values = dataclasses.asdict(manifest)
    parts = []
    for key, value in values.items():
        if key in ("matrices", "kept"):
            lines = ",\n".join(f"  {_dump(item)}" for item in value)
            text = f"[\n{lines}\n ]" if value else "[]"
        elif key == "files":
            lines = ",\n".join(f"  {_dump(name)}: {_dump(item)}" for name, item in value.items())
            text = f"{{\n{lines}\n }}"
        else:
            text = _dump(value)
        parts.append(f" {_dump(key)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest of a finished output directory.

    Raises:
        LoftqError: there is none, it is damaged, or a newer loftq wrote it.
    """
    path = Path(directory) / NAME
    try:
        values = json.loads(path.read_bytes())
        if values["manifest_version"] > MANIFEST_VERSION:
            raise LoftqError(f"{path} was written by a newer loftq: upgrade with pip install -U loftq-cli.")
        return _parse(values)
    except FileNotFoundError:
        raise LoftqError(_missing(Path(directory))) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoftqError(f"{path} is damaged ({error}): convert the model again.") from error


def _missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"there is no directory {directory}: give the output of `loftq quantize`."
    if (directory / ".loftq").is_dir():
        return f"the conversion in {directory} is not finished: run the same `loftq quantize` command again to go on."
    return f"{directory} holds no {NAME}: give the output of `loftq quantize`."


def _parse(values: dict[str, Any]) -> Manifest:
    values["totals"] = Totals(**values["totals"])
    values["notes"] = tuple(values["notes"])
    values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
    values["matrices"] = tuple(parse_matrix_record(record) for record in values["matrices"])
    values["kept"] = tuple(KeptRecord(**{**record, "shape": tuple(record["shape"])}) for record in values["kept"])
    return Manifest(**values)


def parse_matrix_record(record: dict[str, Any]) -> MatrixRecord:
    """A record from JSON."""
    return MatrixRecord(**{**record, "shape": tuple(record["shape"]), "residuals": tuple(record["residuals"])})


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
