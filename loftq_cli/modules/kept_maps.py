"""Keep module maps in the user's cache folder, so that a command need not import transformers to find them again.

A map depends on config.json, on the names and shapes of the tensors, and on the code that finds it: transformers,
torch and this package. All of these are hashed into the name of the file. Importing transformers' model code takes
longer than the rest of the conversion of a small model.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loftq_cli.machine.cache import cache_folder, cached_bytes, keep
from loftq_cli.machine.json_record import InvalidRecord, json_record, read_json
from loftq_cli.modules.roles import ModuleMap, map_modules

_CODE = ("transformers", "torch")
_MOST_BYTES = 8 << 20  # of one file; a checkpoint with more tensors takes long to convert anyway
_MOST_FILES = 100


@json_record
@dataclass(frozen=True)
class _Kept:
    """A file of the cache: a map as JSON text, and the sha256 of that text."""

    sha256: str
    map: str


def map_modules_once(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModuleMap:
    """Return `map_modules(config, shapes)`, from the cache if this process has not imported transformers yet.

    Raises:
        LoftqError: as `map_modules`.
    """
    code = None if _transformers_is_imported() else _code()
    if code is None:
        return map_modules(config, shapes)
    inputs = json.dumps([code, config, list(shapes.items())]).encode()
    path = cache_folder() / "modules" / f"{hashlib.sha256(inputs).hexdigest()}.json"
    found = _read(path)
    if found is None:
        found = map_modules(config, shapes)
        if not found.unbuilt:  # a missing library may be installed later
            _write(path, found)
    return found


def _transformers_is_imported() -> bool:
    return "transformers" in sys.modules  # the import is what takes long


def _code() -> list[object] | None:
    """Return what identifies the code that finds roles; None if it may change while its version stays the same."""
    try:
        versions = [version(package) for package in _CODE]
    except PackageNotFoundError:
        return None
    specs = [find_spec(package) for package in _CODE]
    places = [Path(spec.origin).parent.parent for spec in specs if spec is not None and spec.origin]
    if any("dev" in text for text in versions) or any(place.name != "site-packages" for place in places):
        return None
    own = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    # Installing or removing a package changes the folder's time: transformers' classes use optional packages.
    times = [place.stat().st_mtime_ns for place in places]
    return [versions, times, sys.version, hashlib.sha256(own).hexdigest()]


def _read(path: Path) -> ModuleMap | None:
    """Return a map that was kept; None if there is none or the file is damaged."""
    content = cached_bytes(path, _MOST_BYTES)
    if content is None:
        return None
    try:
        kept = read_json(_Kept, content)
        if hashlib.sha256(kept.map.encode()).hexdigest() != kept.sha256:
            return None
        return read_json(ModuleMap, kept.map)
    except InvalidRecord:
        return None


def _write(path: Path, found: ModuleMap) -> None:
    """Keep a map; if there are many already, the oldest is removed."""
    text = _text(found)
    if len(text) > _MOST_BYTES // 2:  # quotation marks take two bytes when the text is written as a JSON string
        return
    keep(path, asdict(_Kept(hashlib.sha256(text.encode()).hexdigest(), text)))
    try:
        files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_MOST_FILES]:
            file.unlink(missing_ok=True)
    except OSError:
        return


def _text(found: ModuleMap) -> str:
    return json.dumps(asdict(found), default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be kept")
