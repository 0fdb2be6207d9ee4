"""`loftq merge`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import guarded, messages, print_json, results, styled, warn
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from loftq_cli.merging.texts import MergeReport

_LINE_EVERY = 5.0  # seconds
_WAYS = ("auto", "dense", "zeros", "gguf", "requantize")


def merge_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of `loftq quantize`.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Adapter directory written by PEFT's save_pretrained.")
    ],
    output: Annotated[
        Path,
        o.option("--output", "-o", help="Directory to write to.", panel="Output", metavar="OUT"),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="dense: full-precision weights; zeros or gguf: a QA-LoRA adapter into the groups' zero points, packed "
            "or as GGUF Q4_1; requantize: quantized again; auto: zeros if exact, else dense.",
            rich_help_panel="Output",
            **o.choice_of(_WAYS),
        ),
    ] = "auto",
    dtype: o.FromRecipe = None,
    max_shard_size: o.FromRecipe = None,
    overwrite: o.Overwrite = False,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Merge a trained adapter into the backbone, one matrix at a time, and write a model without an adapter.

    A QA-LoRA adapter merges exactly into packed integers with the same bits. Any other adapter merges into dense
    weights, or into quantized ones on request, and the error of that is reported.

    Example: loftq merge llama-2bit trained-adapter -o llama-merged
    """
    with guarded(debug, resumable="interrupted; nothing was finished: run the same command again."):
        from loftq_cli.merging.merge import merge

        report = merge(
            directory,
            adapter,
            output=output,
            to=to,
            dtype=dtype or "auto",
            max_shard_size=max_shard_size or "5GB",
            overwrite=overwrite,
            force=force,
            noted=(lambda note: None) if quiet else warn,
            progress=_Ticker(silent=quiet or json),
        )
        if json:
            values = dataclasses.asdict(report)
            print_json({**values, "mean_error": report.mean_error, "worst_error": report.worst_error})
        elif not quiet:
            _print_report(report)


class _Ticker:
    """Prints a line to stderr every few seconds."""

    def __init__(self, *, silent: bool) -> None:
        self._silent, self._last = silent, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._silent and now - self._last >= _LINE_EVERY:
            self._last = now
            messages().print(f"merging tensor {done + 1} of {total}")


def _print_report(report: MergeReport) -> None:
    console = results()
    how = {
        "dense": f"dense {report.dtype} weights",
        "zeros": f"{report.format}, the update in the groups' zero points, same bits",
        "gguf": "GGUF Q4_1, the update in the groups' zero points, same codes",
        "requantize": f"{report.format}, quantized again",
    }[report.way]
    console.print(f"{len(report.errors)} matrices merged: {how}, {size_text(report.backbone_bytes)}", soft_wrap=True)
    cause = "quantizing again" if report.way == "requantize" else "rounding"
    console.print(
        f"error of {cause}: {report.mean_error:.2e} of backbone + adapter on average, {report.worst_error:.2e} at "
        "worst "
        "(relative, Frobenius)",
        soft_wrap=True,
    )
    console.print()
    console.print(styled("written to ", (str(report.output), "bold")), soft_wrap=True)
