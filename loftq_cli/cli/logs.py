"""What libraries print by themselves, as log records and warnings: names of tensors and files may be in it."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

from loftq_cli.hub.secrets import redact
from loftq_cli.machine.printable import printable

_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")  # which transformers uses in its reports, and which harms nothing


def clean_logs() -> None:
    """Escape control characters and remove secrets in every log record and warning of this process from now on."""
    make, show = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        made.msg, made.args = clean(_message(made)), ()
        return made

    def formatted(message: Warning | str, *args: Any, **options: Any) -> str:
        return clean(show(message, *args, **options))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = formatted  # type: ignore[assignment]


def clean(text: str) -> str:
    """Return text of several lines that is safe to print; colours stay."""
    parts = _COLOUR.split(redact(text))
    return "".join(part if i % 2 else printable(part, "\n\t") for i, part in enumerate(parts))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # a record whose arguments do not fit its text, which logging would report instead
        return str(record.msg)
