"""The one output of the commands: data to stdout, messages to stderr, everything printable and without secrets."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from loftq_cli.cli.usage import usage_sentence
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.hub.secrets import redact
from loftq_cli.machine.panics import is_panic
from loftq_cli.machine.printable import json_text, printable
from loftq_cli.machine.streams import lost_results, writing_results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def messages() -> Console:
    """Return the console on stderr, for people."""
    from loftq_cli.cli.console import SafeConsole

    return SafeConsole(stderr=True)


def results() -> Console:
    """Return the console on stdout, for results; wide if it is not a terminal, so that lines are not folded."""
    from loftq_cli.cli.console import SafeConsole

    return SafeConsole(width=None if sys.stdout.isatty() else 120)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return text for a console from strings and (string, style) pairs; none of them is read as markup."""
    from rich.text import Text

    return Text.assemble(*(_clean(part) if isinstance(part, str) else (_clean(part[0]), part[1]) for part in parts))


def print_json(content: Any) -> None:
    """Print one JSON object to stdout."""
    with writing_results(sys.stdout):
        typer.echo(json_text(content, getattr(sys.stdout, "encoding", None) or "utf-8"))


def warn(text: str) -> None:
    """Print a note to stderr."""
    messages().print(styled(("note:", "yellow"), f" {text}"), soft_wrap=True)


@contextmanager
def guarded(debug: bool, resumable: str | None = None, *, mute: bool = False) -> Iterator[None]:
    """Turn errors into one sentence and an exit code; with `debug`, print the traceback before it.

    Args:
        resumable: the sentence for an interruption; None if nothing is kept.
        mute: set the exit code only.
    """
    try:
        with _results_must_arrive(mute):
            yield
    except LoftqError as error:
        _fail(str(error), error.exit_code, mute, error if debug else None)
    except KeyboardInterrupt:
        _fail(resumable or "interrupted.", ExitCode.INTERRUPTED, mute)
    except BrokenPipeError:
        raise typer.Exit(ExitCode.FAILED) from None
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        _unexpected(error, debug, mute)


@contextmanager
def _results_must_arrive(mute: bool) -> Iterator[None]:
    """Say so if results could not be written; the exit code of a failed command stays as it is."""
    lost_results()  # of an earlier command in this process
    try:
        yield
    except typer.Exit as done:
        if done.exit_code and (sentence := lost_results()):
            _say(sentence, mute)
        if done.exit_code:
            raise
    if sentence := lost_results():
        raise LoftqError(sentence)


def _unexpected(error: BaseException, debug: bool, mute: bool) -> None:
    if isinstance(error, typer.Exit):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
    advice = "please report it with this traceback." if debug else "run it again with --debug for the traceback."
    _fail(f"unexpected {what}; {advice}", ExitCode.FAILED, mute, error if debug else None)


def report_usage_error(error: Exception) -> ExitCode:
    """Print an error of Typer about the command line, or the help that was asked for by giving no argument."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
    else:
        messages().print(styled(("loftq:", "bold red"), f" {usage_sentence(error)}"), soft_wrap=True)
    return ExitCode.USAGE


def quiet_hub_logging(*, silent: bool) -> None:
    """Silence huggingface_hub, whose warnings the commands report in one sentence; its progress bars appear only in a
    terminal."""
    from huggingface_hub import logging
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    if silent or not sys.stderr.isatty():
        disable_progress_bars()
        if "transformers" in sys.modules:  # it reads the setting of huggingface_hub only once, when it is imported
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()


def duration(seconds: float) -> str:
    """Return a duration such as `8.4 s`, `3 min 20 s` or `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _fail(sentence: str, code: ExitCode, mute: bool, shown: BaseException | None = None) -> None:
    _say(sentence, mute, shown)
    raise typer.Exit(int(code))


def _say(sentence: str, mute: bool, shown: BaseException | None = None) -> None:
    if mute:
        return
    console = messages()
    if shown is not None:
        for line in "".join(traceback.format_exception(shown)).splitlines():
            console.print(line, soft_wrap=True)
    console.print(styled(("loftq:", "bold red"), f" {sentence}"), soft_wrap=True)


def _clean(text: str) -> str:
    return printable(redact(text))
