"""`loftq inspect`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, print_json, results, styled
from loftq_cli.machine.confined import user_path
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
    from loftq_cli.artifacts.plain_model import PlainModel


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Output of `loftq quantize` or `loftq merge`, or any model: a directory, or org/name on the Hub.",
        ),
    ],
    json: o.Json = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Show the contents of a converted directory: every matrix with its bits and residuals, and the totals. The experts
    of a layer share one line with their means, unless --verbose lists them. Of a model that is no conversion it shows
    the tensors with their types and sizes.

    Example: loftq inspect llama-2bit
    """
    with guarded(debug):
        from loftq_cli.artifacts.manifest import NAME, read_manifest
        from loftq_cli.artifacts.plain_model import describe_model

        directory = user_path(model)
        plain = any((directory / name).is_file() for name in ("config.json", "params.json"))  # the latter is Meta's
        if (directory / NAME).exists() or (directory.is_dir() and not plain):
            manifest = read_manifest(directory)
            if json:
                print_json(dataclasses.asdict(manifest))
            else:
                _print_manifest(manifest, verbose)
            return
        described = describe_model(model)
        if json:
            print_json(dataclasses.asdict(described))
        else:
            _print_model(described)


def _print_model(described: PlainModel) -> None:
    from loftq_cli.cli.tables import Name, name_table

    console = results()
    facts = ("shape", "type", "bytes")
    table = name_table(console, "tensor", *facts, right=facts)
    for tensor in described.tensors:
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(Name(tensor.name), shape, tensor.dtype, size_text(tensor.nbytes))
    console.print(table)
    how = f"quantized by {described.quantization}" if described.quantization else f"mostly {described.dtype}"
    files = "1 file" if described.files == 1 else f"{described.files} files"
    console.print()
    console.print(
        f"{described.architecture or 'checkpoint'}, not a conversion: {described.parameters:,} numbers in "
        f"{len(described.tensors)} tensors, {size_text(described.nbytes)} in {files}, {how}",
        soft_wrap=True,
    )
    if described.merge is not None:
        errors = described.merge.get("errors")
        count = len(errors) if isinstance(errors, dict) else 0
        way = described.merge.get("way")
        console.print(f"merged by loftq ({way}): an adapter was added to {count} matrices", soft_wrap=True)


def _print_manifest(manifest: Manifest, verbose: bool) -> None:
    from loftq_cli.cli.tables import Name, name_table

    console = results()
    numbers = ("out × in", "bits", "rank", "plain", "kept", "gain", "step", "bytes")
    table = name_table(console, "matrix", *numbers, right=numbers)
    groups: dict[str, list[MatrixRecord]] = {}
    for record in manifest.matrices:
        # A layer may have hundreds of experts, so each of its stacked parameters gets one line.
        grouped = record.expert is not None and not verbose
        groups.setdefault(record.parameter if grouped else record.module, []).append(record)
    for name, records in groups.items():
        table.add_row(Name(name), *_row(records))
    console.print(table)
    if verbose:
        kept = name_table(console, "in full precision", "why", "bytes", right=("bytes",))
        for item in manifest.kept:
            kept.add_row(Name(item.tensor), item.reason, size_text(item.nbytes))
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
        f"mean residual {totals.plain_residual:.4f} plain, {totals.residual:.4f} kept; {duration(totals.seconds)} on "
        f"{manifest.device}, peak {size_text(totals.peak_memory_bytes)}",
        soft_wrap=True,
    )


def _row(records: list[MatrixRecord]) -> list[str]:
    """Return the cells of a matrix, or of a group with the same shape, bits and rank, with their means."""
    record, count = records[0], len(records)
    plain = sum(item.plain_residual for item in records) / count
    kept = sum(item.residual for item in records) / count
    gain = 1 - kept / plain if plain else 0.0
    best = {item.best for item in records}
    steps = f"{min(best)}–{max(best)}" if len(best) > 1 else str(record.best)
    steps = f"{steps}/{len(record.residuals)}" if record.residuals else "-"
    return [
        f"{f'{count} × ' if count > 1 else ''}{record.shape[0]} × {record.shape[1]}",
        f"{record.bits} {record.data_type}",
        str(record.rank) if record.rank else "-",
        f"{plain:.4f}",
        f"{kept:.4f}",
        f"{gain:.0%}",
        steps,
        size_text(sum(item.backbone_bytes for item in records)),
    ]
