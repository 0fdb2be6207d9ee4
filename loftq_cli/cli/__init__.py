"""The command line: parse, call, print. Nothing here imports torch before a command runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from loftq_cli.cli.batch import batch_command
from loftq_cli.cli.eval import eval_command
from loftq_cli.cli.inspect import inspect_command
from loftq_cli.cli.merge import merge_command
from loftq_cli.cli.plan import plan_command
from loftq_cli.cli.push import push_command
from loftq_cli.cli.quantize import quantize_command
from loftq_cli.cli.schema import schema_command
from loftq_cli.cli.verify import verify_command
from loftq_cli.machine.openmp import openmp_spin_env

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "peft", "bitsandbytes", "numba")

app = typer.Typer(
    name="loftq",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Hugging Face checkpoints with LoftQ, matrix by matrix: a backbone of 2, 3, 4 or 8 bits and a LoRA "
    "adapter that starts training where the full-precision model stood.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 4 incomplete (the same command goes on), "
    "130 interrupted (state kept).",
)
app.command("quantize", rich_help_panel="Convert")(quantize_command)
app.command("plan", rich_help_panel="Convert")(plan_command)
app.command("batch", rich_help_panel="Convert")(batch_command)
app.command("merge", rich_help_panel="Convert")(merge_command)
app.command("inspect", rich_help_panel="Look")(inspect_command)
app.command("eval", rich_help_panel="Look")(eval_command)
app.command("push", rich_help_panel="Share")(push_command)
app.command("schema", rich_help_panel="Look")(schema_command)
app.command("verify", rich_help_panel="Look")(verify_command)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from loftq_cli._version import __version__

    typer.echo(f"loftq {__version__}\npython {platform.python_version()}")
    for package in _PACKAGES:
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} not installed")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the versions that matter and leave."
        ),
    ] = False,
) -> None:
    """Options of `loftq` itself."""


def main() -> None:
    """The console script."""
    os.environ.update(openmp_spin_env(os.environ))
    app()
