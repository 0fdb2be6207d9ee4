"""Containers: one file each, found by name."""

from __future__ import annotations

from loftq_cli.errors import UsageError
from loftq_cli.formats.base import Format
from loftq_cli.formats.bnb import BnbFormat
from loftq_cli.formats.dense import DenseFormat
from loftq_cli.formats.packed import PackedFormat

FORMATS: dict[str, Format] = {item.name: item for item in (PackedFormat(), BnbFormat(), DenseFormat())}


def get_format(name: str) -> Format:
    """The container called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"there is no format '{name}': choose auto, {', '.join(FORMATS)}.")
    return FORMATS[name]
