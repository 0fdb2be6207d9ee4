"""Small JSON files in the user's cache folder: measurements that need not be repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from loftq_cli.machine.json_record import InvalidRecord, read_json

V = TypeVar("V")


def cache_folder() -> Path:
    """Return `~/.cache/loftq`, or `loftq` under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"


def read_cached(path: Path, kind: type[V]) -> dict[str, V]:
    """Return a cached JSON object whose values are of type `kind`; an empty one if the file is missing or damaged."""
    try:
        return read_json(dict[str, kind], path.read_bytes())  # type: ignore[valid-type]
    except (OSError, InvalidRecord):
        return {}


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; if the cache cannot be written, the content is measured again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
    except OSError:
        return
