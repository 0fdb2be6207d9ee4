"""Retry requests to the Hub after transient failures, for a bounded time."""

from __future__ import annotations

import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.hub.answers import CutShort, bound_answer
from loftq_cli.hub.secrets import redact
from loftq_cli.machine.printable import printable

ATTEMPTS = 7
OPENING_ATTEMPTS = 3  # no work is lost yet, so fail after seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
LONGEST_TOTAL = 1800.0  # seconds that one request may wait, all attempts together
_LONGEST_RETRY_AFTER = 600.0  # seconds; the Hub counts requests in windows of five minutes
_SHOWN = 5.0  # seconds; longer pauses are shown to the user
_DIGITS = re.compile(r"[0-9]{1,15}")
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


@dataclass
class Attempts:
    """Counts the failures of one request and waits after each.

    Attributes:
        most: failures in a row that end the request.
        stop: ends the waiting when it is set; a reading thread cannot be interrupted otherwise.
    """

    most: int = ATTEMPTS
    stop: threading.Event | None = None
    _failures: int = field(default=0, init=False)
    _waited: float = field(default=0.0, init=False)

    def progressed(self) -> None:
        """Start counting again, because data arrived; the time spent waiting still counts."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            Exception: `error` itself, if it is not transient, if this was the last attempt, or if the server asks for
                a longer wait than allowed.
            LoftqError: `stop` was set.
        """
        self._failures += 1
        failure = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if not is_transient(error) or self._failures >= self.most:
            raise error
        seconds = pause(failure, self._failures)
        if seconds > _LONGEST_RETRY_AFTER or self._waited + seconds > LONGEST_TOTAL:
            raise error
        self._waited += seconds
        level = logging.WARNING if seconds >= _SHOWN else logging.INFO
        log.log(level, "The Hub: %s; waiting %.0f s before the next attempt.", reason(failure), seconds)
        _sleep(seconds, self.stop)


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
        asked = retry_after(error.response)
        if asked is not None:
            return asked
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


def with_retries(call: Callable[[], T], attempts: int = ATTEMPTS, stop: threading.Event | None = None) -> T:
    """Return the result of `call`, retrying it after transient failures; `stop` is explained in `Attempts`."""
    tried = Attempts(attempts, stop)
    while True:
        limit_library()
        try:
            return call()
        except Exception as error:
            tried.failed(error)


def limit_library() -> None:
    """Bound what huggingface_hub itself does: it sleeps for as long as a server asks, and reads all that comes."""
    hooks = getattr(get_session(), "event_hooks", None)
    if isinstance(hooks, dict) and _check_wait not in hooks.setdefault("response", []):
        hooks["response"] += [_check_wait, bound_answer]


def _check_wait(response: Any) -> None:
    """Refuse a response that asks for too long a wait, and show long waits to the user.

    Raises:
        HfHubHTTPError: the server asks to wait longer than allowed.
    """
    if response.status_code not in _TRANSIENT:
        return
    seconds = retry_after(response)
    if seconds is None:
        response.headers.pop("Retry-After", None)  # malformed: huggingface_hub would fail to parse some values
    elif seconds > _LONGEST_RETRY_AFTER:
        raise HfHubHTTPError(f"HTTP status {response.status_code}", response=response)
    elif seconds >= _SHOWN:
        log.warning("The Hub asks to wait %.0f s (HTTP status %d).", seconds, response.status_code)


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise LoftqError("reading was interrupted.", exit_code=ExitCode.INTERRUPTED)


def reason(error: BaseException) -> str:
    """Describe an error in a few words and without URLs, because links to files are signed."""
    if isinstance(error, HfHubHTTPError):
        asked = retry_after(error.response)
        long = asked is not None and asked > _LONGEST_RETRY_AFTER
        return f"HTTP status {error.response.status_code}{_too_long(asked) if long and asked else ''}"
    text = re.sub(r"https?://\S+", "…", " ".join(str(error).split()))
    return printable(redact(text)) or type(error).__name__


def _too_long(seconds: float) -> str:
    span = f"{seconds / 3600:.0f} hours" if seconds < 172_800 else f"{min(seconds / 86_400, 1e6):.0f} days"
    return f", with the request to wait {span}" if seconds >= 7200 else f", with the request to wait {seconds:.0f} s"


def retry_after(response: Any) -> float | None:
    """Return the seconds in `Retry-After` (or until its date) or in `RateLimit: "api";r=0;t=55`; None without them."""
    after = str(response.headers.get("Retry-After", "")).strip()
    if after.isascii() and after.isdigit():
        return float(after) if _DIGITS.fullmatch(after) else float("inf")
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        pass
    window = re.search(r"\bt\s*=\s*([0-9]+)", str(response.headers.get("RateLimit", "")))
    if window is None or response.status_code != 429:
        return None
    return float(window[1]) + 1 if _DIGITS.fullmatch(window[1]) else float("inf")
