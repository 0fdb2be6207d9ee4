"""Panics of Rust libraries such as tokenizers: a message on stderr and an exception that is not an `Exception`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

_MESSAGE = b"panicked at "


class Panic(Exception):
    """A library has panicked; the text is its message."""


def is_panic(error: BaseException) -> bool:
    """Return True for the exception that a panic raises. It has no importable class and derives from BaseException."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def catch_panics() -> Iterator[None]:
    """Raise a panic as `Panic` and drop the message that Rust writes to stderr.

    What is written to stderr meanwhile, by any thread, appears when the context ends.

    Raises:
        Panic: the code in the context has panicked.
    """
    with tempfile.TemporaryFile() as held:
        panicked = True
        try:
            with _stderr_to(held):
                yield
            panicked = False
        except BaseException as error:
            panicked = is_panic(error)
            if panicked:
                raise Panic(" ".join(str(error).split())) from None
            raise
        finally:
            held.seek(0)
            content = held.read()
            if content and not (panicked and _MESSAGE in content):
                with contextlib.suppress(OSError):
                    os.write(2, content)


@contextlib.contextmanager
def _stderr_to(file: BinaryIO) -> Iterator[None]:
    """Redirect the file descriptor of stderr, which is the one that Rust writes to."""
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    _flush()
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(saved, 2)
        os.close(saved)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stderr.flush()
