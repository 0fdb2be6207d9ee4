"""`loftq.json`: a record of every matrix, the hash of every file, and the totals.

The manifest covers itself too: `digest` is the sha256 of the file with zeros in place of the digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, with_config

from loftq_cli._version import pip_install
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.html import html_table
from loftq_cli.machine.json_record import Amount, Count, InvalidRecord, Sha256, Size, json_record, one_of, read_json
from loftq_cli.machine.regular_files import read_bounded
from loftq_cli.machine.sizes import size_text
from loftq_cli.modules.experts import Expert
from loftq_cli.modules.orientation import Orientation, orientation_of
from loftq_cli.numerics.grids.codebooks import DATA_TYPES, LEVELS
from loftq_cli.recipe.choices import BITS
from loftq_cli.recipe.model import recipe_fields
from loftq_cli.tensorfile.hashing import FileRecord

NAME = "loftq.json"
MERGE_MARK = "merge"  # in `.loftq`, while a merge into the directory is unfinished
MANIFEST_VERSION = 1
_LARGEST = 256 << 20  # bytes; a manifest of 70,000 matrices has about 40 MB
UNSEALED = "0" * 64
# JSON strings contain no line feeds, so this can only match the field itself.
_DIGEST = re.compile(rb'(?<=\n "digest": ")[0-9a-f]{64}(?=")')


DtypeName = Annotated[str, one_of("float32", "bfloat16", "float16")]
_MatrixKind = Annotated[str, one_of("linear", "conv1d", "head", "embedding", "expert")]
_TensorKind = Annotated[str, one_of("linear", "conv1d", "head", "embedding", "expert", "other")]


def _check_file_name(name: str) -> str:
    """Return a path below the output directory; anything else could read or delete files elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "." or "\0" in name:
        raise ValueError("must be a relative path below the directory")
    return name


FileName = Annotated[str, AfterValidator(_check_file_name)]


def _check_recipe(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check the fields that other commands rely on; `Recipe` checks the rest when one is built from them."""
    known = recipe_fields()
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"has an unknown field {name!r:.80}")
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        scalar = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
        if not (listed or scalar):
            raise ValueError(f"has a field {name} of a wrong type or a number that is not finite")
    group = values.get("group_size")
    if values.get("method") == "qa-lora" and (type(group) is not int or group < 1):
        raise ValueError(f"has the group_size {group!r:.80}, which must be a positive integer for qa-lora")
    return values


@json_record
@dataclass(frozen=True)
class AffineRecord:
    """The fields of an integer grid besides bits, group size and the two dtypes that every grid has.

    Attributes: as in `numerics.grids.affine.AffineGrid`.
    """

    zero: Annotated[str, one_of("none", "integer", "float")]
    zero_dtype: DtypeName
    product_dtype: DtypeName
    least_zero: int
    scale_rule: Annotated[str, one_of("absmax", "minmax", "mse")]


@json_record
@dataclass(frozen=True)
class MatrixRecord:
    """One quantized matrix. Residuals are ‖W - Q - BA‖_F / ‖W‖_F.

    With calibration, the weighted residuals are ‖(W - Q - BA) R‖_F / ‖W R‖_F with R Rᵀ the second moment of the
    layer's inputs (`numerics.methods.weighted`), and the best step is the one with the smallest weighted residual.

    Attributes:
        module: path of the module; for an expert's matrix its parameter and number.
        shape: [out, in] as the layer computes, regardless of the orientation on disk.
        data_type: the codebook (`numerics.grids.codebooks`), or `int`.
        parameter: the parameter that PEFT adapts, "" if it adapts a module; `expert`: the expert it belongs to.
        block_size, layout, scale_dtype, value_dtype: the container's grid (`numerics.grids.blocks.BlockGrid`).
        affine: the other fields of an integer grid; None for codebooks.
        nested: absmax is quantized too (`--double-quant`).
        heads: attention heads whose rows the container reorders (`formats.base.QuantizedMatrix`).
        plain_residual: of quantization alone, without an adapter and without iterations.
        residuals: after each LoftQ step; empty for QLoRA. `best`: the step that was kept, counted from 1; 0 for none.
        seconds: of computing, without reading and writing; matrices computed together share their time equally.
    """

    tensor: str
    module: str
    kind: _MatrixKind
    parameter: str
    expert: Expert | None
    shape: tuple[Size, Size]
    bits: Annotated[int, one_of(*BITS)]
    data_type: Annotated[str, one_of(*DATA_TYPES, *LEVELS, "int")]
    block_size: Count
    layout: Annotated[str, one_of("rows", "flat")]
    scale_dtype: DtypeName
    value_dtype: DtypeName
    rank: Count
    plain_residual: Amount
    residual: Amount
    residuals: tuple[Amount, ...]
    best: Count
    seconds: Amount
    backbone_bytes: Count
    adapter_bytes: Count
    weighted_plain_residual: Amount | None = None
    weighted_residual: Amount | None = None
    affine: AffineRecord | None = None
    nested: bool = False
    heads: Count = 0

    def __post_init__(self) -> None:
        if self.affine is None and self.block_size == 0:
            raise ValueError("has block_size 0, which must be at least 1 for a codebook")
        if (self.affine is None) == (self.data_type == "int"):
            raise ValueError("has only one of data_type 'int' and affine, which belong together")

    @property
    def orientation(self) -> Orientation:
        """The orientation in which the source stores it."""
        return orientation_of(self.kind, self.expert)


@json_record
@dataclass(frozen=True)
class KeptRecord:
    """A tensor kept in full precision, and the reason; `rank` > 0 if it has an adapter, which starts at zero.

    Attributes:
        module: its path; for an expert's matrix the parameter, and `expert` is the expert it belongs to.
        shape: as it is stored.
    """

    tensor: str
    module: str | None
    kind: _TensorKind
    shape: tuple[Count, ...]
    reason: str
    rank: Count
    nbytes: Count
    expert: Expert | None = None

    @property
    def orientation(self) -> Orientation:
        """The orientation in which a matrix is stored."""
        return orientation_of(self.kind, self.expert)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of a matrix."""
        return self.orientation.turn_shape((self.shape[0], self.shape[1]))


@json_record
@dataclass(frozen=True)
class Totals:
    """Sums and unweighted means over the quantized matrices; bytes of all tensors."""

    matrices: Count
    source_bytes: Count
    backbone_bytes: Count
    adapter_bytes: Count
    quantized_weights: Count
    bits_effective: Amount
    bits_stored: Amount
    plain_residual: Amount
    residual: Amount
    seconds: Amount
    peak_memory_bytes: Count
    peak_device_memory_bytes: Count


@json_record
@dataclass(frozen=True)
class Manifest:
    """The whole record of one conversion.

    Attributes:
        source, source_revision: a model id on the Hub and its commit, or a directory and None.
        digest: of the file itself (`seal`).
    """

    manifest_version: Size
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
    dtype: DtypeName
    scaling: Amount
    device: str
    recipe: Annotated[Mapping[str, Any], AfterValidator(_check_recipe)]
    totals: Totals
    notes: tuple[str, ...]
    files: Mapping[FileName, FileRecord]
    matrices: Annotated[tuple[MatrixRecord, ...], Field(min_length=1)]
    kept: tuple[KeptRecord, ...]
    digest: Sha256 = UNSEALED

    @property
    def pooling(self) -> int:
        """Inputs pooled before the adapters (QA-LoRA); 1 for none."""
        return int(self.recipe["group_size"]) if self.recipe.get("method") == "qa-lora" else 1

    def _repr_html_(self) -> str:
        """Return the totals as a table, which notebooks show."""
        totals = self.totals
        residual = f"{totals.residual:.4f} with the adapter, {totals.plain_residual:.4f} plain"
        rows = [
            ("model", f"{self.source} ({self.architecture})" if self.architecture else self.source),
            ("weights", f"{size_text(totals.source_bytes)} → {size_text(totals.backbone_bytes)}"),
            ("adapter", size_text(totals.adapter_bytes)),
            ("bits per weight", f"{totals.bits_effective:.2f} effective, {totals.bits_stored:.2f} stored"),
            ("mean residual", residual if totals.adapter_bytes else f"{totals.residual:.4f}"),
            ("matrices", f"{totals.matrices} quantized, {len(self.kept)} tensors in full precision"),
            ("format", f"{self.format}, {self.dtype}"),
            ("time", f"{totals.seconds:.1f} s on {self.device}"),
            ("peak memory", size_text(totals.peak_memory_bytes)),
        ]
        return html_table(self.output, rows)

    def matrix(self, name: str) -> MatrixRecord:
        """Return the record of a module path or a tensor name.

        Raises:
            LoftqError: no quantized matrix has that name.
        """
        for record in self.matrices:
            if name in (record.module, record.tensor):
                return record
        raise LoftqError(f"no quantized matrix is called {name}: `loftq inspect` lists them.")


def render(manifest: Manifest) -> bytes:
    """Render JSON with one matrix, kept tensor or file per line, so that it can be read and searched with grep."""
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
    """Return the rendered manifest with its digest filled in, at the same length; sealing twice changes nothing."""
    blank = _DIGEST.sub(UNSEALED.encode(), content)
    return _DIGEST.sub(hashlib.sha256(blank).hexdigest().encode(), blank)


def is_sealed(content: bytes) -> bool:
    """True if the file is, to the last bit, what `seal` returned."""
    return _DIGEST.search(content) is not None and seal(content) == content


@with_config(ConfigDict(extra="ignore", strict=True))
@dataclass(frozen=True)
class _Version:
    """The one field that every version of the file has."""

    manifest_version: int


def read_content(path: Path) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        LoftqError: it is not a regular file, or too large.
        OSError: it cannot be read.
    """
    return read_bounded(path, _LARGEST)


def read_manifest(directory: Path | str) -> Manifest:
    """Read the manifest of a finished output directory.

    Raises:
        LoftqError: it is missing, damaged or no file of a manifest's size, or a newer loftq wrote it.
    """
    path = Path(directory) / NAME
    try:
        return parse_manifest(path, read_content(path))
    except FileNotFoundError:
        raise _missing(Path(directory)) from None
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error


def parse_manifest(path: Path, content: bytes) -> Manifest:
    """Parse the content of a manifest; `path` is used in messages.

    Raises:
        LoftqError: it is damaged, or a newer loftq wrote it.
    """
    try:
        if read_json(_Version, content).manifest_version > MANIFEST_VERSION:
            raise LoftqError(f"{path} was written by a newer loftq: run `{pip_install(upgrade=True)}`.")
        return read_json(Manifest, content)
    except InvalidRecord as error:
        raise LoftqError(f"{path} is damaged ({error}): convert the model again.") from error


def _missing(directory: Path) -> LoftqError:
    if not directory.is_dir():
        return LoftqError(f"there is no directory {directory}: give the output of `loftq quantize`.")
    if (directory / ".loftq").is_dir():
        return unfinished(directory)
    return LoftqError(f"{directory} holds no {NAME}: give the output of `loftq quantize`.")


def unfinished(directory: Path) -> LoftqError:
    """Return the error for a directory whose conversion or merge is unfinished."""
    if (directory / ".loftq" / MERGE_MARK).exists():
        return LoftqError(
            f"the merge into {directory} is not finished: run the same `loftq merge` command again.",
            exit_code=ExitCode.INCOMPLETE,
        )
    return LoftqError(
        f"the conversion in {directory} is not finished: run the same `loftq quantize` command again to go on.",
        exit_code=ExitCode.INCOMPLETE,
    )


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
