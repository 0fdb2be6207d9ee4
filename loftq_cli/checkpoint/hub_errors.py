"""What can go wrong on the way to the Hub: what passes by itself, and the sentence for what does not."""

from __future__ import annotations

import email.utils
import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loftq_cli.errors import ExitCode, LoftqError

ATTEMPTS = 7
OPENING_ATTEMPTS = 3  # nothing is lost yet, so the sentence comes after seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
_LONGEST_WISH = 600.0  # seconds; the Hub counts requests in windows of five minutes
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})

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


@contextmanager
def hub_errors(model: HubModel, *, stream: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence with the next step."""
    try:
        yield
    except LoftqError:
        raise
    except (HTTPError, EntryNotFoundError, CutShort, OSError) as error:
        raise _sentence(error, model, stream) from error


def _sentence(error: Exception, model: HubModel, stream: bool) -> LoftqError:
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(error, OfflineModeIsEnabled) or (is_offline_mode() and isinstance(error, LocalEntryNotFoundError)):
        return LoftqError(_offline(model, stream))
    if isinstance(cause, HTTPError) or isinstance(error, HTTPError):
        return _network_sentence(cause if isinstance(cause, HTTPError) else error, model)
    if isinstance(error, CutShort):
        return _unreachable(model, f"stopped answering: {reason(error)}")
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return LoftqError(
            f"the Hub cache is full ({error.strerror}): make room, or give --stream, which keeps no copy of the "
            "weights.",
            exit_code=ExitCode.INCOMPLETE,
        )
    return LoftqError(f"{model} could not be fetched ({reason(error)}): run the same command again.")


def _network_sentence(error: Exception, model: HubModel) -> LoftqError:
    endpoint = HfApi().endpoint
    page = f"{endpoint}/{model.repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        login = "" if get_token() else ", then log in with `hf auth login`"
        return LoftqError(f"{model.repo} is gated: ask for access at {page}{login} and run the same command again.")
    if isinstance(error, RevisionNotFoundError):
        return LoftqError(f"{model.repo} has no revision {model.revision}: {page}/tree/main lists branches and tags.")
    if isinstance(error, RepositoryNotFoundError):
        return LoftqError(
            f"there is no directory {model.repo}, and {endpoint} shows no model of that name: check the spelling, or "
            "log in with `hf auth login` if it is private."
        )
    if isinstance(error, DisabledRepoError):
        return LoftqError(f"{model.repo} was disabled on {endpoint}: give another model.")
    if status == 401:
        return LoftqError(
            f"{endpoint} does not accept the token: make a new one at {endpoint}/settings/tokens and log in with "
            "`hf auth login`, or correct HF_TOKEN."
        )
    if status == 403:
        return LoftqError(
            f"the token may not read {model.repo}: give one with read access from {endpoint}/settings/tokens."
        )
    if isinstance(error, EntryNotFoundError):
        return LoftqError(f"a file of {model} is gone from {endpoint}: run the same command again.")
    if isinstance(error, HfHubHTTPError) and not passes(error):
        return LoftqError(f"{endpoint} refuses to give {model} (HTTP status {status}): look at {page}.")
    return _unreachable(model, f"does not answer: {reason(error)}")


def _unreachable(model: HubModel, what: str) -> LoftqError:
    return LoftqError(
        f"{HfApi().endpoint} {what}; {model} cannot be read: check the network, then run the same command again to go "
        "on.",
        exit_code=ExitCode.INCOMPLETE,
    )


def _offline(model: HubModel, stream: bool) -> str:
    if stream:
        return "--stream reads from the Hub, but HF_HUB_OFFLINE is set: unset it, or leave --stream out."
    return (
        f"HF_HUB_OFFLINE is set and the Hub cache has no complete copy of {model}: unset it, or fetch the model before "
        f"with `hf download {model.repo}`."
    )


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
