"""Remove tokens and signatures of links from messages, and from the errors whose tracebacks `--debug` prints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loftq_cli.machine.secrets import without_secrets


def redact(text: str) -> str:
    """Return the text without the user's token, anything that looks like one, passwords and signatures of links."""
    return without_secrets(text, users_token())


def users_token() -> str | None:
    """Return the token that requests to the Hub are sent with; None while nothing could have sent it, and if its file
    cannot be read."""
    if "huggingface_hub" not in sys.modules:  # importing it takes as long as `loftq --help`
        return None
    from huggingface_hub import get_token

    try:
        return get_token()
    except (OSError, ValueError):  # of another user, below a file, or not text
        return None


@contextmanager
def scrubbed_errors() -> Iterator[None]:
    """Redact every error that passes, of whatever class, because `--debug` and callers in Python print tracebacks."""
    try:
        yield
    except BaseException as error:
        scrub(error)
        raise


def scrub(error: BaseException) -> None:
    """Redact an error and all of its causes in place."""
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(redact(item) if isinstance(item, str) else item for item in one.args)
        for name, value in list(getattr(one, "__dict__", {}).items()):
            if isinstance(value, str):
                setattr(one, name, redact(value))
        if isinstance(one, OSError):  # which prints these, not its arguments
            for name in ("strerror", "filename", "filename2"):
                if isinstance(value := getattr(one, name, None), str):
                    setattr(one, name, redact(value))
        if notes := getattr(one, "__notes__", None):
            one.__notes__ = [redact(str(note)) for note in notes]
        inside = [item for item in one.args if isinstance(item, BaseException)]  # as urllib3's errors have
        rest += [one.__cause__, one.__context__, *inside, *getattr(one, "exceptions", ())]
