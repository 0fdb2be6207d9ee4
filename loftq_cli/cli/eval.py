"""`loftq eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, messages, print_json, quiet_hub_logging, results, styled, warn
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from loftq_cli.evaluation.evaluate import EvalReporter
    from loftq_cli.evaluation.scores import Evaluation

_TEXT, _WITH, _HOW = "Text", "What is compared", "Running"


def eval_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Output of `loftq quantize` or `loftq merge`, or any model: a directory, or org/name on the Hub.",
        ),
    ],
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
    adapter: Annotated[
        Optional[Path],
        o.option(
            "--adapter",
            help="Measure with this adapter too, as PEFT's save_pretrained wrote it after training.",
            metavar="ADAPTER",
            panel=_WITH,
        ),
    ] = None,
    source: Annotated[
        Optional[str],
        o.option(
            "--source",
            help="The full-precision model to compare with.",
            shown="the model a conversion was made from",
            metavar="SOURCE",
            panel=_WITH,
        ),
    ] = None,
    force: o.Force = False,
    device: o.Device = "auto",
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure the loss of quantization on a text, and how much of it the adapter recovers.

    Compares the source, its plain quantization, the backbone alone, with its starting adapter, and with a trained one:
    by perplexity for a decoder, by the loss on masked tokens or on the second half of each window for other language
    models, and by the error of the hidden states otherwise; and by KL, the mean divergence of the predictions from the
    source's. A model that is no conversion is measured by itself, or against --source. Computed in float32, one model
    at a time, with one block in memory.

    Example: loftq eval llama-2bit --text wikitext2-test.txt --adapter trained
    """
    with guarded(debug):
        from loftq_cli.evaluation.evaluate import evaluate

        quiet_hub_logging(silent=quiet or json)
        found = evaluate(
            model,
            text,
            adapter=adapter,
            source=source,
            max_tokens=max_tokens,
            window=window,
            device=device,
            force=force,
            noted=(lambda note: None) if quiet else warn,
            reporter=_reporter(silent=quiet or json),
        )
        if json:
            print_json(dataclasses.asdict(found))
        elif not quiet:
            _print_evaluation(found)


def _reporter(*, silent: bool) -> EvalReporter:
    """Return a progress bar for a terminal, and a silent reporter otherwise."""
    from rich.progress import Progress

    from loftq_cli.evaluation.evaluate import EvalReporter

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

    from loftq_cli.evaluation.scores import MODELS

    console, language = results(), found.metric != "representation error"
    compared = len(found.scores) > 1
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", no_wrap=True)
    table.add_column("")
    measures = ["perplexity" if found.metric == "perplexity" else "exp(loss)", *(["KL"] if compared else ["loss"])]
    for column in (*(measures if language else ["error"]), *(["of plain's gap"] if compared else []), "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in found.scores:
        second = score.kl if compared else score.loss
        numbers = [f"{score.perplexity:.3f}", "" if second is None else f"{second:.4f}"] if score.perplexity else []
        gap = ["" if score.gap is None else f"{score.gap:.1%}"] if compared else []
        cells = [*(numbers or [f"{score.loss:.4f}"]), *gap, f"{score.seconds:.1f}"]
        table.add_row(score.model, styled((MODELS[score.model], "dim")), *cells)
    console.print(table)
    for note in found.notes:
        console.print()
        console.print(styled(("note:", "yellow"), f" {note}"), soft_wrap=True)
    how = f"one of {found.blocks} blocks in memory at a time" if found.blocks else "the whole model in memory"
    peak = size_text(found.peak_memory_bytes)
    if found.peak_device_memory_bytes:
        peak += f", {size_text(found.peak_device_memory_bytes)} on the GPU"
    console.print()
    console.print(
        f"{found.metric} of {found.tokens:,} tokens of {found.text} in {found.windows} windows of {found.window}",
        soft_wrap=True,
    )
    if language and compared:
        console.print("KL is the mean divergence of the predictions from the source's, in nats a token", soft_wrap=True)
    console.print(
        f"{duration(found.seconds)} on {found.device} in float32, {how}, peak memory {peak}",
        soft_wrap=True,
    )
