"""Retries of requests to the Hub: which wait the server asks for, and how long one request may wait in all."""

from __future__ import annotations

import email.utils
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.hub import retry
from loftq_cli.hub.retry import Attempts, CutShort, retry_after, with_retries


def response(status: int = 429, **headers: str) -> Any:
    return SimpleNamespace(status_code=status, headers={name.replace("_", "-"): text for name, text in headers.items()})


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry_After": "11"}, 11.0),
        ({"Retry_After": " 31536000 "}, 31536000.0),
        ({"Retry_After": "9" * 5000}, float("inf")),
        ({"Retry_After": "²"}, None),
        ({"Retry_After": "٣"}, None),
        ({"Retry_After": "-5"}, None),
        ({"Retry_After": "soon"}, None),
        ({"Retry_After": "Mon, 01 Jan 99999 00:00:00 GMT"}, None),
        ({"Retry_After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"RateLimit": '"api";r=0;t=54'}, 55.0),
        ({"RateLimit": '"api";r=0;t=' + "9" * 5000}, float("inf")),
        ({"RateLimit": "nonsense"}, None),
    ],
)
def test_the_wait_that_a_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(response(**headers)) == seconds


def test_a_date_to_wait_for() -> None:
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < (retry_after(response(Retry_After=later)) or 0) <= 101


def test_the_total_wait_is_bounded_and_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A server that sends a byte between its failures resets the number of attempts, not the time."""
    slept: list[float] = []
    monkeypatch.setattr(retry, "_sleep", lambda seconds, _: slept.append(seconds))
    monkeypatch.setattr(retry, "FIRST_PAUSE", 20.0)
    attempts = Attempts()
    with caplog.at_level(logging.WARNING), pytest.raises(CutShort, match="cut"):
        while True:
            attempts.failed(CutShort("cut off"))
            attempts.progressed()
    assert retry.LONGEST_TOTAL - 20 < sum(slept) <= retry.LONGEST_TOTAL
    assert len(caplog.messages) == len(slept) and caplog.messages[0].startswith("The Hub: cut off; waiting ")


def test_attempts_are_counted_and_other_errors_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    calls: list[int] = []

    def fail(error: Exception) -> None:
        calls.append(1)
        raise error

    with pytest.raises(CutShort):
        with_retries(lambda: fail(CutShort("x")), 3)
    assert len(calls) == 3
    with pytest.raises(KeyError):
        with_retries(lambda: fail(KeyError("x")), 3)
    assert len(calls) == 4
    stop = threading.Event()
    stop.set()
    with pytest.raises(LoftqError, match="interrupted") as caught:
        with_retries(lambda: fail(CutShort("x")), 3, stop)
    assert caught.value.exit_code == ExitCode.INTERRUPTED
