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


@contextlib.contextmanager
def reader_may_leave(stream: IO[str]) -> Iterator[None]:
    """Ignore that the reader of a pipe has closed it, now and from then on: the result does not depend on it."""
    try:
        yield
    except BrokenPipeError:
        discard(stream)


def discard(stream: IO[str]) -> None:
    """Send what is written to a stream from now on to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
