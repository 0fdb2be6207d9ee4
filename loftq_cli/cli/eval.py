"""`loftq eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, messages, print_json, quiet_hub_logging, results, styled
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from loftq_cli.evaluation import EvalReporter, Evaluation

_TEXT, _HOW = "Text", "Running"


def eval_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of `loftq quantize`.")],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            help="Text to measure on: .txt, .jsonl, .json, .parquet, a directory of them, or a dataset on the Hub.",
            metavar="FILE|DATASET",
            rich_help_panel=_TEXT,
        ),
    ],
    max_tokens: Annotated[
        Optional[int],
        o.option(
            "--max-tokens",
            help="Use only this many tokens from the start of the text.",
            shown="all",
            metavar="N",
            panel=_TEXT,
        ),
    ] = None,
    window: Annotated[
        Optional[int],
        o.option(
            "--window",
            help="Tokens in one window of the model's context.",
            shown="the model's context length, at most 2048",
            metavar="N",
            panel=_TEXT,
        ),
    ] = None,
    source: Annotated[
        Optional[str],
        o.option(
            "--source",
            help="The full-precision model.",
            shown="the model it was converted from",
            metavar="MODEL",
            panel=_HOW,
        ),
    ] = None,
    device: o.Device = "auto",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure the loss of quantization on a text, and how much of it the adapter recovers.

    Compares the source, its plain quantization, the backbone alone and the backbone with its adapter: by perplexity for
    a decoder, by the loss on masked tokens or on the second half of each window for other language models, and by the
    error of the hidden states otherwise. Computed in float32, one model at a time, with one block in memory.

    Example: loftq eval llama-2bit --text wikitext2-test.txt
    """
    with guarded(debug):
        from loftq_cli.evaluation import evaluate

        quiet_hub_logging(silent=quiet or json)
        found = evaluate(
            directory,
            text,
            source=source,
            max_tokens=max_tokens,
            window=window,
            device=device,
            reporter=_reporter(silent=quiet or json),
        )
        if json:
            print_json(dataclasses.asdict(found))
        elif not quiet:
            _print_evaluation(found)


def _reporter(*, silent: bool) -> EvalReporter:
    """Return a progress bar for a terminal, and a silent reporter otherwise."""
    from rich.progress import Progress

    from loftq_cli.evaluation import EvalReporter

    console = messages()
    if silent or not console.is_terminal:
        return EvalReporter()
    bar = Progress(console=console, transient=True)

    class Bar(EvalReporter):
        def start(self, work: int) -> None:
            bar.start()
            self._task = bar.add_task("source", total=work)

        def advance(self, model: str) -> None:
            bar.update(self._task, advance=1, description=model)

        def close(self) -> None:
            bar.stop()

    return Bar()


def _print_evaluation(found: Evaluation) -> None:
    from rich.table import Table

    from loftq_cli.evaluation import MODELS

    console, language = results(), found.metric != "representation error"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = ("perplexity", "loss") if language else ("error",)
    for column in ("model", "", *columns, "of plain's gap", "seconds"):
        table.add_column(column, justify="left" if column in ("model", "") else "right", no_wrap=True)
    for score in found.scores:
        numbers = [f"{score.perplexity:.3f}", f"{score.loss:.4f}"] if score.perplexity else [f"{score.loss:.4f}"]
        gap = "" if score.gap is None else f"{score.gap:.1%}"
        table.add_row(score.model, styled((MODELS[score.model], "dim")), *numbers, gap, f"{score.seconds:.1f}")
    console.print(table)
    how = f"one of {found.blocks} blocks in memory at a time" if found.blocks else "the whole model in memory"
    peak = size_text(found.peak_memory_bytes)
    if found.peak_device_memory_bytes:
        peak += f", {size_text(found.peak_device_memory_bytes)} on the GPU"
    console.print()
    console.print(
        f"{found.metric} of {found.tokens:,} tokens of {found.text} in {found.windows} windows of {found.window}",
        soft_wrap=True,
    )
    console.print(
        f"{duration(found.seconds)} on {found.device} in float32, {how}, peak memory {peak}",
        soft_wrap=True,
    )
