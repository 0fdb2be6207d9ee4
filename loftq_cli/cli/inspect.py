"""`loftq inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, print_json, results, styled
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from loftq_cli.artifacts.manifest import Manifest, MatrixRecord


def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of `loftq quantize`.")],
    json: o.Json = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Show the contents of a converted directory: every matrix with its bits and residuals, and the totals. The experts
    of a layer share one line with their means, unless --verbose lists them.

    Example: loftq inspect llama-2bit
    """
    with guarded(debug):
        from loftq_cli.artifacts.manifest import read_manifest

        manifest = read_manifest(directory)
        if json:
            print_json(dataclasses.asdict(manifest))
        else:
            _print_manifest(manifest, verbose)


def _print_manifest(manifest: Manifest, verbose: bool) -> None:
    from rich.table import Table

    console = results()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("matrix", overflow="fold")
    for column in ("out × in", "bits", "rank", "plain", "kept", "gain", "step", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    groups: dict[str, list[MatrixRecord]] = {}
    for record in manifest.matrices:
        # A layer may have hundreds of experts, so each of its stacked parameters gets one line.
        grouped = record.expert is not None and not verbose
        groups.setdefault(record.parameter if grouped else record.module, []).append(record)
    for name, records in groups.items():
        table.add_row(*_row(name, records))
    console.print(table)
    if verbose:
        kept = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("in full precision", "why", "bytes"):
            kept.add_column(column, overflow="fold")
        for item in manifest.kept:
            kept.add_row(item.tensor, item.reason, size_text(item.nbytes))
        console.print()
        console.print(kept)
    totals = manifest.totals
    console.print()
    console.print(
        styled(
            f"{manifest.architecture or 'checkpoint'} as ",
            (manifest.format, "bold"),
            f" ({manifest.dtype}): {totals.matrices} matrices, {len(manifest.kept)} tensors in full precision"
            f"{'' if verbose else ' (--verbose lists them)'}",
        ),
        soft_wrap=True,
    )
    console.print(
        f"{size_text(totals.source_bytes)} → {size_text(totals.backbone_bytes)} backbone + "
        f"{size_text(totals.adapter_bytes)} adapter; {totals.bits_effective:.2f} bits effective, "
        f"{totals.bits_stored:.2f} stored",
        soft_wrap=True,
    )
    console.print(
        f"mean residual {totals.plain_residual:.4f} plain → {totals.residual:.4f}; {duration(totals.seconds)} on "
        f"{manifest.device}, peak {size_text(totals.peak_memory_bytes)}",
        soft_wrap=True,
    )


def _row(name: str, records: list[MatrixRecord]) -> list[str]:
    """Return the cells of a matrix, or of a group with the same shape, bits and rank, with their means."""
    record, count = records[0], len(records)
    plain = sum(item.plain_residual for item in records) / count
    kept = sum(item.residual for item in records) / count
    gain = 1 - kept / plain if plain else 0.0
    best = {item.best for item in records}
    steps = f"{min(best)}–{max(best)}" if len(best) > 1 else str(record.best)
    steps = f"{steps}/{len(record.residuals)}" if record.residuals else "-"
    return [
        name,
        f"{f'{count} × ' if count > 1 else ''}{record.shape[0]} × {record.shape[1]}",
        f"{record.bits} {record.data_type}",
        str(record.rank) if record.rank else "-",
        f"{plain:.4f}",
        f"{kept:.4f}",
        f"{gain:.0%}",
        steps,
        size_text(sum(item.backbone_bytes for item in records)),
    ]
