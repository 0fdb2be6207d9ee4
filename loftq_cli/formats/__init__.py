"""Containers: one package each, found by name. Importing this package does not load torch; `get_format` does."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from loftq_cli.formats.registry import FORMATS, choose_container, container_in, container_of, get_container

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

__all__ = ["FORMATS", "choose_container", "container_in", "container_of", "get_container", "get_format"]


@cache
def get_format(name: str) -> Format:
    """Return the implementation of the container called `name`.

    Raises:
        UsageError: there is none.
    """
    return get_container(name).open()
