"""Log records and warnings of libraries reach the terminal without control characters and secrets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from loftq_cli.cli.logs import clean, clean_logs

NAME = "layer\x1b[2J\u202e of hf_abcdefgh12345678"
SHOWN = "layer\\x1b[2J\\u202e of ***"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = logging.getLogRecordFactory(), warnings.formatwarning
    yield
    logging.setLogRecordFactory(before[0])
    warnings.formatwarning = before[1]  # type: ignore[assignment]


def test_records_and_warnings_are_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    clean_logs()
    logging.getLogger("some.library").warning("missing %s in %d files", NAME, 3)
    logging.getLogger("some.library").warning("wrong %d %s", NAME)
    assert caplog.messages == [f"missing {SHOWN} in 3 files", "wrong %d %s"]
    text = warnings.formatwarning(f"odd {NAME}", UserWarning, "file.py", 1)
    assert SHOWN in text and text.endswith("\n")


def test_colours_and_lines_stay() -> None:
    assert clean("a\x1b[1;31mb\x1b[0m\n\tc\x07") == "a\x1b[1;31mb\x1b[0m\n\tc\\x07"
