"""One sink for everything the commands print: data to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from loftq_cli.errors import ExitCode, LoftqError

if TYPE_CHECKING:
    from rich.console import Console


def messages() -> Console:
    """Where people read: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def results() -> Console:
    """Where results go: stdout; wide when it is no terminal, so that logs are not folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def warn(text: str) -> None:
    """A sentence on stderr that does not stop the work."""
    messages().print(f"[yellow]note:[/] {_plain(text)}", soft_wrap=True)


@contextmanager
def guarded(debug: bool, resumable: str | None = None, *, mute: bool = False) -> Iterator[None]:
    """Turn errors into one sentence and an exit code; with `debug`, let them through with their traceback.

    Args:
        resumable: what to say about going on when the user interrupts; None where nothing is kept.
        mute: give the exit code only.
    """
    try:
        yield
    except LoftqError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code, mute)
    except KeyboardInterrupt:
        _fail(resumable or "interrupted.", ExitCode.INTERRUPTED, mute)
    except BrokenPipeError:
        raise typer.Exit(ExitCode.FAILED) from None
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _fail(
            f"unexpected {' '.join(what.split())}; run it again with --debug for the traceback.", ExitCode.FAILED, mute
        )


def quiet_hub_logging(*, silent: bool) -> None:
    """Silence huggingface_hub, whose warnings the commands report in one sentence; its progress bars appear only in a
    terminal."""
    from huggingface_hub import logging
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    if silent or not sys.stderr.isatty():
        disable_progress_bars()


def gigabytes(size: float) -> str:
    """Return a size such as `26 GB`, `91.4 MB` or `812 kB`: three significant digits and decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 100 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """Return a duration such as `8.4 s`, `3 min 20 s` or `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _fail(sentence: str, code: ExitCode, mute: bool) -> None:
    if not mute:
        messages().print(f"[bold red]loftq:[/] {_plain(sentence)}", soft_wrap=True)
    raise typer.Exit(int(code))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
