"""`loftq push`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loftq_cli.cli import options as o
from loftq_cli.cli.terminal import guarded, messages, print_json, quiet_hub_logging, results, warn
from loftq_cli.machine.sizes import size_text

if TYPE_CHECKING:
    from loftq_cli.publishing.push import Pushed

_WHERE = "Where to"


def push_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Finished output of `loftq quantize`.")],
    repo: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub, created if it does not exist.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.", rich_help_panel=_WHERE)
    ] = False,
    revision: Annotated[
        Optional[str],
        o.option(
            "--revision",
            help="Branch to push to, created if it does not exist; or refs/pr/N.",
            shown="main",
            panel=_WHERE,
            metavar="BRANCH",
        ),
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option(
            "--create-pr",
            help="Open a pull request; the same command run again continues with it.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    message: Annotated[
        Optional[str],
        o.option("--message", "-m", help="Commit message, and title of the pull request.", panel=_WHERE),
    ] = None,
    base_model: Annotated[
        Optional[str],
        o.option(
            "--base-model",
            help="Name of the converted model for the card, if it was read from a directory.",
            panel=_WHERE,
            metavar="ORG/NAME",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify and list the files without uploading.", rich_help_panel="Running")
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Upload a finished conversion to the Hub.

    The directory is verified first and is not changed. In the uploaded copy, the adapter, the card and the manifest
    name the repository. If the upload is interrupted, run the same command again to resume it.

    Example: loftq push llama-2bit some-org/Llama-2-13b-loftq-2bit --private
    """
    with guarded(debug, resumable="interrupted; uploaded files stay on the Hub: run the same command again to resume."):
        from loftq_cli.publishing.push import push

        silent = quiet or json
        quiet_hub_logging(silent=silent)
        console = messages()
        pushed = push(
            directory,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            base_model=base_model,
            dry_run=dry_run,
            progress=None if silent else lambda step: console.print(step, soft_wrap=True),
        )
        if json:
            print_json(dataclasses.asdict(pushed))
        elif not quiet:
            _print(pushed)


def _print(pushed: Pushed) -> None:
    from loftq_cli.cli.tables import Name, name_table

    console = results()
    if pushed.left_out:
        warn(f"not pushed, because not part of the conversion: {', '.join(pushed.left_out)}.")
    if pushed.dry_run:
        table = name_table(console, "would push", "bytes", right=("bytes",))
        for name, size in pushed.files.items():
            table.add_row(Name(name), f"{size:,}")
        console.print(table)
    total = size_text(sum(pushed.files.values()))
    verb = "would be pushed" if pushed.dry_run else "pushed"
    console.print(f"{len(pushed.files)} files of {total} {verb} to {pushed.url}", soft_wrap=True)
