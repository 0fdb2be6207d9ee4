"""`loftq.json`: what was done to every matrix, what every file must hash to, and the totals.

The manifest vouches for itself too: `digest` is the sha256 of the file with zeros in the digest's own place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.modules.experts import Expert
from loftq_cli.modules.orientation import Orientation, orientation_of
from loftq_cli.tensorfile.hashing import FileRecord

NAME = "loftq.json"
MANIFEST_VERSION = 1
UNSEALED = "0" * 64
# Strings hold no line feeds in JSON, so that this can only be the field itself.
_DIGEST = re.compile(rb'(?<=\n "digest": ")[0-9a-f]{64}(?=")')


_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "str": (str,),
    "str | None": (str, type(None)),
}


@dataclass(frozen=True)
class MatrixRecord:
    """One quantized matrix. Residuals are ‖W - Q - BA‖_F / ‖W‖_F.

    Where it was calibrated, the weighted ones are ‖(W - Q - BA) R‖_F / ‖W R‖_F with R Rᵀ the second moment of the
    layer's inputs (`numerics.weighted`), and the best step is the one with the smallest of these.

    Attributes:
        module: path of the module; of an expert's matrix its parameter and number.
        shape: [out, in] as the layer computes, whatever the orientation on disk.
        parameter: what PEFT adapts in place of a module, "" for a module; `expert`: whose matrix it is.
        block_size, layout, scale_dtype, value_dtype: the container's grid (`numerics.blocks.BlockGrid`).
        affine: what an integer grid has besides (`numerics.affine.AffineGrid`); None for codebooks.
        nested: absmax is quantized too (`--double-quant`).
        heads: attention heads whose rows the container reorders (`formats.base.QuantizedMatrix`).
        plain_residual: without an adapter and without iterations, what quantization alone leaves.
        residuals: after each LoftQ step; empty for QLoRA. `best`: the step that was kept, from 1; 0 for none.
        seconds: of computing, without what goes on meanwhile; matrices that were computed together share them alike.
    """

    tensor: str
    module: str
    kind: str
    parameter: str
    expert: Expert | None
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
    affine: Mapping[str, Any] | None = None
    nested: bool = False
    heads: int = 0

    @property
    def orientation(self) -> Orientation:
        """How the source stores it."""
        return orientation_of(self.kind, self.expert)


@dataclass(frozen=True)
class KeptRecord:
    """A tensor left in full precision, and why; `rank` > 0 where it got an adapter that starts at zero.

    Attributes:
        module: its path; of an expert's matrix the parameter, and `expert` says whose it is.
        shape: as it is stored.
    """

    tensor: str
    module: str | None
    kind: str
    shape: tuple[int, ...]
    reason: str
    rank: int
    nbytes: int
    expert: Expert | None = None

    @property
    def orientation(self) -> Orientation:
        """How a matrix is stored."""
        return orientation_of(self.kind, self.expert)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of a matrix."""
        return self.orientation.turn_shape((self.shape[0], self.shape[1]))




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
        digest: of the file itself (`seal`).
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
    digest: str = UNSEALED

    @property
    def pooling(self) -> int:
        """Inputs pooled before the adapters (QA-LoRA); 1 for none."""
        return int(self.recipe["group_size"]) if self.recipe.get("method") == "qa-lora" else 1

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


def seal(content: bytes) -> bytes:
    """The rendered manifest with its digest in place, in the same number of bytes; sealing twice does no harm."""
    blank = _DIGEST.sub(UNSEALED.encode(), content)
    return _DIGEST.sub(hashlib.sha256(blank).hexdigest().encode(), blank)


def is_sealed(content: bytes) -> bool:
    """Whether the file is, to the last bit, what `seal` gave."""
    return _DIGEST.search(content) is not None and seal(content) == content


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest of a finished output directory.

    Raises:
        LoftqError: there is none, it is damaged, or a newer loftq wrote it.
    """
    path = Path(directory) / NAME
    try:
        return parse_manifest(path, path.read_bytes())
    except FileNotFoundError:
        raise _missing(Path(directory)) from None
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error


def parse_manifest(path: Path, content: bytes) -> Manifest:
    """A manifest from the content of its file; `path` is for messages.

    Raises:
        LoftqError: it is damaged, or a newer loftq wrote it.
    """
    try:
        values = json.loads(content)
        if values["manifest_version"] > MANIFEST_VERSION:
            raise LoftqError(f"{path} was written by a newer loftq: upgrade with pip install -U loftq-cli.")
        return _parse(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoftqError(f"{path} is damaged ({error}): convert the model again.") from error


def _missing(directory: Path) -> LoftqError:
    if not directory.is_dir():
        return LoftqError(f"there is no directory {directory}: give the output of `loftq quantize`.")
    if (directory / ".loftq").is_dir():
        return unfinished(directory)
    return LoftqError(f"{directory} holds no {NAME}: give the output of `loftq quantize`.")


def unfinished(directory: Path) -> LoftqError:
    """What to say of a directory whose conversion has not come to its end."""
    return LoftqError(
        f"the conversion in {directory} is not finished: run the same `loftq quantize` command again to go on.",
        exit_code=ExitCode.INCOMPLETE,
    )


def _parse(values: dict[str, Any]) -> Manifest:
    values["totals"] = Totals(**_checked(Totals, values["totals"]))
    values["notes"] = tuple(values["notes"])
    values["files"] = {name: FileRecord(**_checked(FileRecord, record)) for name, record in values["files"].items()}
    values["matrices"] = tuple(parse_matrix_record(record) for record in values["matrices"])
    values["kept"] = tuple(_parse_kept(record) for record in values["kept"])
    return Manifest(**_checked(Manifest, values))


def parse_matrix_record(record: dict[str, Any]) -> MatrixRecord:
    """A record from JSON."""
    record = _checked(MatrixRecord, record)
    expert = Expert(**record["expert"]) if record["expert"] else None
    shape, residuals = tuple(record["shape"]), tuple(record["residuals"])
    return MatrixRecord(**{**record, "expert": expert, "shape": shape, "residuals": residuals})


def _parse_kept(record: dict[str, Any]) -> KeptRecord:
    record = _checked(KeptRecord, record)
    expert = Expert(**record["expert"]) if record.get("expert") else None
    return KeptRecord(**{**record, "expert": expert, "shape": tuple(record["shape"])})


def _checked(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, once its plain fields are of the types that `cls` says.

    Raises:
        TypeError: one is not.
    """
    for field in dataclasses.fields(cls):
        kinds = _PLAIN.get(str(field.type))
        if kinds is not None and type(values.get(field.name)) not in kinds:
            raise TypeError(f"{field.name} is {values.get(field.name)!r:.80}")
    return values


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
