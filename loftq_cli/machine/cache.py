"""Small JSON files in the user's cache folder: measurements that need not be repeated."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from loftq_cli.errors import LoftqError
from loftq_cli.machine.json_record import InvalidRecord, read_json
from loftq_cli.machine.regular_files import read_bounded

V = TypeVar("V")

_MOST_BYTES = 64 << 20


def cache_folder() -> Path:
    """Return `~/.cache/loftq`, or `loftq` under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"


def cached_bytes(path: Path, most: int = _MOST_BYTES) -> bytes | None:
    """Return the content of a file in the cache; None if it is missing, too large, or a pipe or device."""
    try:
        return read_bounded(path, most)
    except (OSError, LoftqError):
        return None


def read_cached(path: Path, kind: type[V]) -> dict[str, V]:
    """Return a cached JSON object whose values are of type `kind`; an empty one if the file is missing or damaged."""
    content = cached_bytes(path)
    try:
        return {} if content is None else read_json(dict[str, kind], content)  # type: ignore[valid-type]
    except InvalidRecord:
        return {}


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; if the cache cannot be written, the content is measured again next time."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file: machines that share a home directory have processes of the same number.
        handle, temporary = tempfile.mkstemp(prefix=f"{path.stem}.", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content))
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
