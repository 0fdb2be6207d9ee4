"""Retry requests to the Hub after transient failures."""

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

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from loftq_cli.errors import ExitCode, LoftqError

ATTEMPTS = 7
OPENING_ATTEMPTS = 3  # no work is lost yet, so fail after seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
_LONGEST_RETRY_AFTER = 600.0  # seconds; the Hub counts requests in windows of five minutes
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
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


def is_transient(error: BaseException) -> bool:
    """True if the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    if isinstance(error, LocalEntryNotFoundError):  # the cache was tried because the Hub failed
        return error.__cause__ is not None and is_transient(error.__cause__)
    return isinstance(error, (HTTPError, CutShort))


def pause(error: BaseException, failures: int) -> float:
    """Return the seconds to wait after the `failures`-th failure in a row: what the server asks for, or exponential
    backoff with jitter."""
    if isinstance(error, HfHubHTTPError):
        asked = _retry_after(error)
        if asked is not None:
            return min(asked, _LONGEST_RETRY_AFTER)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


def with_retries(call: Callable[[], T], attempts: int = ATTEMPTS, stop: threading.Event | None = None) -> T:
    """Return the result of `call`, retrying it after transient failures; `stop` is explained in `wait`."""
    for failures in range(1, attempts):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            wait(error, failures, stop)
    return call()


def wait(error: BaseException, failures: int, stop: threading.Event | None = None) -> None:
    """Sleep before the next attempt.

    Args:
        stop: ends the sleep and the attempts when it is set; a reading thread cannot be interrupted otherwise.

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
    """Describe an error in a few words and without URLs, because links to files are signed."""
    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    return re.sub(r"https?://\S+", "…", " ".join(str(error).split())) or type(error).__name__


def _retry_after(error: HfHubHTTPError) -> float | None:
    """Return the seconds in `Retry-After` (or until its date) or in `RateLimit: "api";r=0;t=55`; None without them."""
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
