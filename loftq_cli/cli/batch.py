"""`loftq batch`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import duration, guarded, messages, print_json, quiet_hub_logging, results, styled, warn
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console

    from loftq_cli.batches.expand import Job
    from loftq_cli.batches.report import BatchReport, Outcome

_COLOURS = {"done": "green", "finished": "green", "planned": "green", "incomplete": "yellow", "interrupted": "yellow"}


def batch_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="YAML recipes; each may hold lists of values under matrix:.")
    ],
    output: Annotated[
        Optional[Path],
        o.option("--output", "-o", help="Directory for recipes that do not name an output.", shown=".", panel="Output"),
    ] = None,
    summary: Annotated[
        Optional[Path],
        typer.Option(
            "--summary", help="Write the report as JSON to this file.", rich_help_panel="Output", metavar="FILE.json"
        ),
    ] = None,
    junit: Annotated[
        Optional[Path],
        typer.Option(
            "--junit",
            help="Write the report as JUnit XML to this file, for CI.",
            rich_help_panel="Output",
            metavar="FILE.xml",
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            help="Number of conversions to run at the same time.",
            rich_help_panel="Running",
            metavar="N",
        ),
    ] = 1,
    device: o.Device = "auto",
    num_processes: o.NumProcesses = None,
    max_memory: o.MaxMemory = None,
    stream: o.Stream = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan every recipe without converting any.", rich_help_panel="Running")
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Convert every recipe in these files and continue after failures.

    Each recipe runs in its own process. Finished conversions are skipped, unfinished ones are resumed. The exit code is
    0 only if all are done. In GitHub Actions the table also appears in the step summary.

    Example: loftq batch configs/*.yaml -o converted --summary summary.json --junit junit.xml
    """
    with guarded(debug, resumable="interrupted; finished work is kept: run the same command again to resume."):
        from loftq_cli.batches.run import BatchReporter, batch

        quiet_hub_logging(silent=True)
        with _sigterm_as_ctrl_c():
            report = batch(
                files,
                output=output,
                jobs=jobs,
                device=device,
                num_processes=num_processes,
                max_memory=max_memory,
                stream=stream,
                overwrite=overwrite,
                dry_run=dry_run,
                verbose=verbose,
                summary=summary,
                junit_file=junit,
                reporter=BatchReporter() if quiet or json else _line_reporter(),
            )
        _step_summary(report)
        if json:
            print_json(report.as_dict())
        elif not quiet:
            _print(report)
        if report.interrupted:
            raise KeyboardInterrupt
        raise typer.Exit(int(report.exit_code))


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which ends a CI job, as Ctrl-C, so that every process saves its state."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line_reporter() -> Any:
    """Return a reporter that prints every line with the name of its recipe."""
    from loftq_cli.batches.run import BatchReporter

    class Lines(BatchReporter):
        def __init__(self, console: Console) -> None:
            self.console, self.total, self.count = console, 0, 0

        def begin(self, jobs: Sequence[Job]) -> None:
            self.total = len(jobs)

        def line(self, job: Job, text: str) -> None:
            if text.startswith("loftq: "):
                return  # `ended` prints the error
            self.console.print(f"{job.name}: {text}", soft_wrap=True)

        def ended(self, job: Job, outcome: Outcome) -> None:
            self.count += 1
            why = f": {outcome.error}" if outcome.error and outcome.exit_code is not None else ""
            text = f"[{self.count}/{self.total}] {job.name}: {outcome.status}{why}"
            self.console.print(text, soft_wrap=True, style=_COLOURS.get(outcome.status, "red"))

    return Lines(messages())


def _print(report: BatchReport) -> None:
    from loftq_cli.cli.tables import Name, name_table

    console = results()
    numbers = ("bits", "size", "residual", "time")
    table = name_table(console, "recipe", "", *numbers, "output", right=numbers)
    for outcome in report.outcomes:
        status = f"{outcome.status}, resumed" if outcome.resumed else outcome.status
        table.add_row(
            Name(outcome.name),
            styled((status, _COLOURS.get(outcome.status, "red"))),
            "" if outcome.bits_effective is None else f"{outcome.bits_effective:.2f}",
            "" if outcome.output_bytes is None else size_text(outcome.output_bytes),
            "" if outcome.residual is None else f"{outcome.residual:.4f}",
            duration(outcome.seconds),
            Name(f"{outcome.output} → {outcome.push_to}" if outcome.push_to else str(outcome.output)),
        )
    console.print(table)
    for outcome in report.outcomes:
        if outcome.error:
            console.print(styled((outcome.name, "bold"), f": {outcome.error}"), soft_wrap=True)
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    console.print()
    console.print(f"{counts} of {len(report.outcomes)} in {duration(report.seconds)}")


def _step_summary(report: BatchReport) -> None:
    from loftq_cli.batches.report import markdown

    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(markdown(report))
    except OSError as error:
        warn(f"the step summary {path} could not be written ({error.strerror}): check GITHUB_STEP_SUMMARY.")
