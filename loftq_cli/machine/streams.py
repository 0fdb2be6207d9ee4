"""The standard streams of a process that may have been started with some of them closed, or whose reader may leave."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO


def prepare_streams() -> None:
    """Make the standard streams usable if they are closed, or in an encoding that lacks our characters."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened, such as a weight file, gets the number, and prints go into it.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_lost: list[OSError] = []


@contextlib.contextmanager
def writing_results(stream: IO[str]) -> Iterator[None]:
    """Go on if a stream cannot be written to, now and from then on: the work does not depend on it.

    A reader of a pipe may leave. Any other error, such as a full disk, is kept for `lost_results`.
    """
    try:
        yield
    except BrokenPipeError:
        discard(stream)
    except OSError as error:
        discard(stream)
        _lost.append(error)


def lost_results() -> str | None:
    """Return the sentence for results that could not be written since the last call; None if there are none."""
    if not _lost:
        return None
    reason = _lost[0].strerror or str(_lost[0])
    _lost.clear()
    return (
        f"the results cannot be written to standard output ({reason}), but all else is done: make room there, or send "
        "them to another place."
    )


def discard(stream: IO[str]) -> None:
    """Send what is written to a stream from now on to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
