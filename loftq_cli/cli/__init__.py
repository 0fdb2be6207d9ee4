"""The command line: parse, call, print. Nothing here imports torch until a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from loftq_cli.cli.batch import batch_command
from loftq_cli.cli.eval import eval_command
from loftq_cli.cli.help_page import SHOW_ALL, HelpfulCommand, page_width, root_page
from loftq_cli.cli.inspect import inspect_command
from loftq_cli.cli.logs import clean_logs
from loftq_cli.cli.merge import merge_command
from loftq_cli.cli.options import with_recipe_options
from loftq_cli.cli.plan import plan_command
from loftq_cli.cli.push import push_command
from loftq_cli.cli.quantize import quantize_command
from loftq_cli.cli.report import report_command
from loftq_cli.cli.schema import schema_command
from loftq_cli.cli.terminal import report_usage_error
from loftq_cli.cli.usage import is_usage_error
from loftq_cli.cli.verify import verify_command
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.openmp import openmp_spin_env
from loftq_cli.machine.streams import discard, prepare_streams
from loftq_cli.machine.system import check_system

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "peft", "bitsandbytes", "numba")

_SETTINGS: dict[str, Any] = {"rich_markup_mode": "rich", "pretty_exceptions_enable": False}
_COMMANDS: dict[str, tuple[str, Callable[..., None]]] = {
    "quantize": ("Convert", quantize_command),
    "plan": ("Convert", plan_command),
    "batch": ("Convert", batch_command),
    "merge": ("Convert", merge_command),
    "inspect": ("Look", inspect_command),
    "eval": ("Look", eval_command),
    "report": ("Look", report_command),
    "push": ("Share", push_command),
    "schema": ("Look", schema_command),
    "verify": ("Look", verify_command),
}


class _Commands(TyperGroup):
    """Lists commands by name and docstring, and adds the options of a command only when it is called. The options come
    from the recipe's fields and need pydantic, which takes as long to import as the rest of `loftq --help`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page of the program; Typer prints nothing more."""
        typer.echo(root_page(self, ctx, page_width()), nl=False)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if "--help-all" in args:
            ctx.meta[SHOW_ALL] = True
            args = ["--help" if word == "--help-all" else word for word in args]
        name, command, rest = super().resolve_command(ctx, args)
        return name, command_with_options(name) if name in _COMMANDS else command, rest

    def main(self, args: Any = None, *, standalone_mode: bool = True, **given: Any) -> Any:  # type: ignore[override]
        """Run the command line; its errors are one sentence each, as those of the commands are."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **given)
        try:
            code = super().main(args, standalone_mode=False, **given)
        except typer.Abort:
            code = ExitCode.FAILED
        except Exception as error:
            if not is_usage_error(error):
                raise
            code = report_usage_error(error)
        sys.exit(int(code or 0))


@cache
def command_with_options(name: str) -> Any:
    """Return the Typer command of this name with all of its options."""
    alone = typer.Typer(add_completion=False, **_SETTINGS)
    alone.command(name, cls=HelpfulCommand)(with_recipe_options(_COMMANDS[name][1]))
    return typer.main.get_command(alone)


def _listed() -> None:
    """A placeholder for a command while commands are listed."""


app = typer.Typer(
    name="loftq",
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Hugging Face checkpoints with LoftQ, matrix by matrix: a backbone of 2, 3, 4 or 8 bits and a LoRA "
    "adapter that starts training close to the full-precision model.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 4 incomplete (run the same "
    "command again to resume), "
    "130 interrupted (state kept).",
    **_SETTINGS,
)
for _name, (_panel, _function) in _COMMANDS.items():
    app.command(_name, help=_function.__doc__, rich_help_panel=_panel)(_listed)


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
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of loftq and its dependencies, and exit.",
        ),
    ] = False,
) -> None:
    """Options of `loftq` itself."""


def main() -> None:
    """Entry point of the console script."""
    prepare_streams()
    try:
        check_system()
    except LoftqError as error:
        _stop(error)
    clean_logs()
    os.environ.update(openmp_spin_env(os.environ))
    try:
        app()
    except OSError as error:  # of the help or the version; commands handle their own
        discard(sys.stdout)
        _stop(LoftqError(f"standard output cannot be written ({error.strerror}): make room there."))


def _stop(error: LoftqError) -> NoReturn:
    """End the process outside of a command, with what needs nothing but Python."""
    print(f"loftq: {error}", file=sys.stderr)
    sys.exit(int(error.exit_code))
