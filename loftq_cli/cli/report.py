"""`loftq report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import guarded, messages, quiet_hub_logging, results
from loftq_cli.machine.sizes import size_text
from loftq_cli.recipe.panels import SHOW, WHERE


def report_command(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Outputs of `loftq quantize`, shown side by side.")
    ],
    output: Annotated[
        Path,
        o.option("--output", "-o", help="The page to write.", shown="report.html", metavar="FILE", panel=WHERE),
    ] = Path("report.html"),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a file that is not a report.", rich_help_panel=WHERE),
    ] = False,
    source: Annotated[
        Optional[str],
        o.option(
            "--source",
            help="The full-precision model, for the singular values of the error.",
            shown="the directory a conversion was made from",
            metavar="MODEL",
            panel=SHOW,
        ),
    ] = None,
    singular_values: Annotated[
        int,
        o.option(
            "--singular-values",
            help="Matrices whose errors' singular values are drawn; 0 for none.",
            shown="3",
            metavar="N",
            panel=SHOW,
        ),
    ] = 3,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Draw conversions as one HTML page: sizes, bits, the residual of every matrix, the share of the embedding, the
    recipe and the hashes. Several directories stand side by side. The page needs no network and no other file.

    Example: loftq report llama-2bit llama-4bit -o report.html
    """
    with guarded(debug):
        from loftq_cli.reporting.job import report

        quiet_hub_logging(silent=quiet)

        def progress(module: str) -> None:
            if not quiet:
                messages().print(f"singular values of {module}", soft_wrap=True)

        page = report(
            directories,
            output=output,
            source=source,
            singular_values=singular_values,
            overwrite=overwrite,
            progress=progress,
        )
        if not quiet:
            results().print(f"{page} is written ({size_text(page.stat().st_size)})", soft_wrap=True)
