"""Build the manifest from a plan and its measurements, and plan the sizes of the manifest and the card.

Both files contain measured numbers, yet `loftq plan` reports the size of every file: they are rendered once with the
widest possible numbers, and the real files are padded with blanks to that length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from loftq_cli.artifacts.card import render_card, source_name
from loftq_cli.artifacts.decode import affine_record
from loftq_cli.artifacts.manifest import MANIFEST_VERSION, KeptRecord, Manifest, MatrixRecord, Totals, render
from loftq_cli.formats.base import DTYPE_NAMES
from loftq_cli.machine.usage import Cost, versions
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.tensorfile.hashing import FileRecord

CARD = "README.md"
_WIDE_NUMBER = 1.2345678e-100
_WIDE_SECONDS = 9999999.999
_WIDE_BYTES = 10**15
_WIDE_DEVICE = "x" * 64
_WIDE_HASH = "0" * 64


@dataclass(frozen=True)
class TextSizes:
    """Bytes of the two files that contain measured numbers."""

    manifest: int
    card: int


def build_manifest(
    plan: Plan,
    source_fingerprint: str,
    records: Mapping[str, MatrixRecord],
    files: Mapping[str, FileRecord],
    cost: Cost,
) -> Manifest:
    """Return the manifest of a finished run; `records` by tensor name."""
    ordered = tuple(records[unit.tensor] for unit in plan.matrices)
    totals = dataclasses.replace(
        _planned_totals(plan),
        plain_residual=_mean([record.plain_residual for record in ordered]),
        residual=_mean([record.residual for record in ordered]),
        seconds=round(cost.seconds, 3),
        peak_memory_bytes=cost.memory,
        peak_device_memory_bytes=cost.device_memory,
    )
    return _manifest(plan, source_fingerprint, ordered, files, totals, cost.device[: len(_WIDE_DEVICE)])


def text_sizes(plan: Plan) -> TextSizes:
    """Return the sizes of the manifest and the card of a plan."""
    records = tuple(_widest_record(unit, plan) for unit in plan.matrices)
    names = [*(file.name for file in plan.files), *plan.texts, *(side.name for side in plan.side_files), CARD]
    files = {name: FileRecord(_WIDE_BYTES, _WIDE_HASH) for name in names}
    totals = dataclasses.replace(
        _planned_totals(plan),
        plain_residual=_WIDE_NUMBER,
        residual=_WIDE_NUMBER,
        seconds=_WIDE_SECONDS,
        peak_memory_bytes=_WIDE_BYTES,
        peak_device_memory_bytes=_WIDE_BYTES,
    )
    manifest = _manifest(plan, _WIDE_HASH, records, files, totals, _WIDE_DEVICE)
    return TextSizes(len(render(manifest)), len(render_card(manifest, plan)))


def pad(content: bytes, size: int) -> bytes:
    """Insert blanks before the last line feed, which is harmless in JSON and Markdown."""
    assert len(content) <= size and content.endswith(b"\n"), "the file is longer than planned"
    return content[:-1] + b" " * (size - len(content)) + b"\n"


def _planned_totals(plan: Plan) -> Totals:
    return Totals(
        matrices=len(plan.matrices),
        source_bytes=plan.source_bytes,
        backbone_bytes=plan.backbone_bytes,
        adapter_bytes=plan.adapter_bytes,
        quantized_weights=plan.quantized_weights,
        bits_effective=round(plan.bits_effective, 4),
        bits_stored=round(plan.bits_stored, 4),
        plain_residual=0.0,
        residual=0.0,
        seconds=0.0,
        peak_memory_bytes=0,
        peak_device_memory_bytes=0,
    )


def _manifest(
    plan: Plan,
    source_fingerprint: str,
    records: tuple[MatrixRecord, ...],
    files: Mapping[str, FileRecord],
    totals: Totals,
    device: str,
) -> Manifest:
    return Manifest(
        manifest_version=MANIFEST_VERSION,
        versions=versions(),
        fingerprint=plan.fingerprint,
        output=str(plan.output),
        source=source_name(plan),
        source_revision=plan.recipe.revision,
        source_fingerprint=source_fingerprint,
        architecture=plan.modules.architecture,
        model_type=plan.modules.model_type,
        task_type=plan.modules.task_type,
        format=plan.recipe.format,
        dtype=DTYPE_NAMES[plan.dtype],
        scaling=plan.recipe.scaling,
        device=device,
        recipe=plan.recipe.as_dict(),
        totals=totals,
        notes=plan.notes,
        files=dict(files),
        matrices=records,
        kept=tuple(
            KeptRecord(
                tensor=unit.tensor,
                module=unit.module,
                kind=unit.kind,
                shape=unit.source.shape,
                reason=str(unit.reason),
                rank=unit.target.rank if unit.target else 0,
                nbytes=unit.backbone_bytes,
                expert=unit.target.expert if unit.target else None,
            )
            for unit in plan.kept
        ),
    )


def matrix_record(
    unit: Unit,
    *,
    plain_residual: float,
    residual: float,
    residuals: tuple[float, ...],
    best: int,
    seconds: float,
    weighted_plain_residual: float | None = None,
    weighted_residual: float | None = None,
) -> MatrixRecord:
    """Return the record of a matrix from its plan and its measurements."""
    matrix, target = unit.matrix, unit.target
    assert matrix is not None
    grid = matrix.grid
    return MatrixRecord(
        tensor=unit.tensor,
        module=matrix.module,
        kind=unit.kind,
        parameter=matrix.parameter,
        expert=matrix.expert,
        shape=matrix.shape,
        bits=grid.bits,
        data_type=grid.data_type,
        block_size=grid.block_size,
        layout=grid.layout if isinstance(grid, BlockGrid) else "rows",
        scale_dtype=DTYPE_NAMES[grid.scale_dtype],
        value_dtype=DTYPE_NAMES[grid.value_dtype],
        rank=target.rank if target else 0,
        plain_residual=plain_residual,
        residual=residual,
        residuals=residuals,
        best=best,
        seconds=seconds,
        backbone_bytes=unit.backbone_bytes,
        adapter_bytes=unit.adapter_bytes,
        weighted_plain_residual=weighted_plain_residual,
        weighted_residual=weighted_residual,
        affine=affine_record(grid) if isinstance(grid, AffineGrid) else None,
        nested=isinstance(grid, BlockGrid) and grid.nested,
        heads=matrix.heads,
    )


def _widest_record(unit: Unit, plan: Plan) -> MatrixRecord:
    adapted = unit.target is not None or plan.recipe.fits_scales
    steps = plan.recipe.iters if adapted and not plan.recipe.plain else 0
    return matrix_record(
        unit,
        plain_residual=_WIDE_NUMBER,
        residual=_WIDE_NUMBER,
        residuals=(_WIDE_NUMBER,) * steps,
        best=steps,
        seconds=_WIDE_SECONDS,
        weighted_plain_residual=None if plan.recipe.calibrate is None else _WIDE_NUMBER,
        weighted_residual=None if plan.recipe.calibrate is None else _WIDE_NUMBER,
    )


def _mean(values: list[float]) -> float:
    return float(f"{sum(values) / len(values):.8g}")
