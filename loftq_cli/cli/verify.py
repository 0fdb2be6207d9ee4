"""`loftq verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import (
    duration,
    gigabytes,
    guarded,
    messages,
    print_json,
    quiet_hub_logging,
    results,
    styled,
)
from loftq_cli.errors import ExitCode

if TYPE_CHECKING:
    from loftq_cli.verification import Step, Verification


def verify_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of `loftq quantize`.")],
    source: Annotated[
        Optional[str],
        typer.Option(
            "--source",
            metavar="MODEL",
            help="The model it was converted from, a directory or org/name; every residual is recomputed from it.",
            show_default=False,
        ),
    ] = None,
    revision: o.FromRecipe = None,
    stream: o.Stream = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Check that a converted directory is bit for bit as it was written.

    The exit code is 3 if anything differs: a flipped bit, a missing or unknown file, or a residual that differs from
    the manifest.

    Example: loftq verify llama-2bit --source path/to/Llama-2-13b
    """
    with guarded(debug):
        from loftq_cli.verification import verify

        quiet_hub_logging(silent=quiet or json)
        with _progress(silent=quiet or json) as progress:
            found = verify(directory, source=source, revision=revision, stream=stream, progress=progress)
        if json:
            print_json({**dataclasses.asdict(found), "ok": found.ok})
        else:
            _print(found, quiet)
    if not found.ok:
        raise typer.Exit(int(ExitCode.VERIFICATION_FAILED))


def _print(found: Verification, quiet: bool) -> None:
    for problem in found.problems:
        results().print(str(problem), soft_wrap=True)
    if not found.ok:
        count = "1 difference" if len(found.problems) == 1 else f"{len(found.problems)} differences"
        messages().print(
            styled(
                ("loftq:", "bold red"),
                f" {count} in {found.directory}: convert the model or download the directory again.",
            ),
            soft_wrap=True,
        )
    elif not quiet:
        text = f"{found.directory} is as it was written: {found.files} files, {gigabytes(found.nbytes)}"
        if found.source is not None:
            text += (
                f"; {found.matrices} residuals recomputed from {found.source} agree within "
                f"{found.largest_deviation:.1e}, {found.kept} tensors are copied exactly"
            )
            if found.weighted:
                text += f"; {found.weighted} weighted residuals agree as well"
        results().print(f"{text} ({duration(found.seconds)})", soft_wrap=True)


@contextmanager
def _progress(*, silent: bool) -> Iterator[Callable[[Step], None] | None]:
    """Yield a callback that updates a progress bar in a terminal, or None elsewhere."""
    console = messages()
    if silent or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[amount]}", markup=False))
    last = (TimeRemainingColumn(compact=True), TextColumn("{task.fields[name]}", style="dim", markup=False))
    with Progress(*columns, *last, console=console, transient=True) as bar:
        task = bar.add_task("files", total=None, amount="", name="")

        def update(step: Step) -> None:
            amount = f"{gigabytes(step.done)} of {gigabytes(step.total)}" if step.of_bytes else ""
            bar.update(
                task,
                description="files" if step.of_bytes else "residuals",
                completed=step.done,
                total=step.total,
                amount=amount or f"{step.done}/{step.total}",
                name=step.name,
            )

        yield update
