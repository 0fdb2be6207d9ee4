"""Requests to the Hub that are tried again after a passing failure."""

from __future__ import annotations

import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
)

from loftq_cli.errors import ExitCode, LoftqError

ATTEMPTS = 7


OPENING_ATTEMPTS = 3  # nothing is lost yet, so the sentence comes after seconds


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0


_LONGEST_WISH = 600.0  # seconds; the Hub counts requests in windows of five minutes


_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})


T = TypeVar("T")


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub; `revision` is a branch, tag, pull request or commit, None the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


class CutShort(Exception):
    """An answer ended before it was complete, or the link to a file is no longer valid."""


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    if isinstance(error, LocalEntryNotFoundError):  # the cache was asked because the Hub failed
        return error.__cause__ is not None and passes(error.__cause__)
    return isinstance(error, (HTTPError, CutShort))


def pause(error: BaseException, failures: int) -> float:
    """Seconds to wait after the `failures`-th failure in a row: what the server asks for, else twice as long each
    time, with some chance so that many clients do not come back at once."""
    if isinstance(error, HfHubHTTPError):
        wish = _wished_pause(error)
        if wish is not None:
            return min(wish, _LONGEST_WISH)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


def patiently(call: Callable[[], T], attempts: int = ATTEMPTS, stop: threading.Event | None = None) -> T:
    """The result of `call`, which is tried again after a pause while its failures are of the passing kind; see `wait`
    for `stop`."""
    for failures in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not passes(error):
                raise
            wait(error, failures, stop)
    return call()


def wait(error: BaseException, failures: int, stop: threading.Event | None = None) -> None:
    """Sleep before the next try.

    Args:
        stop: ends the sleep, and the tries, when it is set; a thread that reads cannot be interrupted otherwise.

    Raises:
        LoftqError: `stop` was set.
    """
    error = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    seconds = pause(error, failures)
    log.info("%s; trying again in %.1f s", reason(error), seconds)
    _sleep(seconds, stop)


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise LoftqError("reading was interrupted.", exit_code=ExitCode.INTERRUPTED)


def reason(error: BaseException) -> str:
    """What happened, in a few words and without an address: links to files are signed."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    return re.sub(r"https?://\S+", "…", " ".join(str(error).split())) or type(error).__name__


def _wished_pause(error: HfHubHTTPError) -> float | None:
    """From `Retry-After` (seconds or a date) or `RateLimit: "api";r=0;t=55`."""
    headers = error.response.headers
    after = str(headers.get("Retry-After", "")).strip()
    if after.isdigit():
        return float(after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except ValueError:
        pass
    window = re.search(r"\bt\s*=\s*(\d+)", str(headers.get("RateLimit", "")))
    return float(window[1]) + 1 if window and error.response.status_code == 429 else None
