"""What this user's machine keeps so that it need not find it out again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """`~/.cache/loftq`, or the one under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loftq"


def read_cached(path: Path) -> dict[str, Any]:
    """A kept JSON object; an empty one where there is none that can be read."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all; where the cache cannot be written it is found out again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
    except OSError:
        return
