"""Find the files of a model that transformers' classes read under names of their own, from the classes' source code.

Tokenizers keep vocabularies in files such as `bpe.codes`, and some models read data such as `spk_dict.pt`. Their names
are string literals in the package of the class below `transformers/models`, so that no list of names is needed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.local import read_json
from loftq_cli.errors import LoftqError

_CLASS_KEYS = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")
_SETTINGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_FILE_LITERAL = re.compile(r"""["']([\w.-]{1,80}\.\w{1,12})["']""")
_DEPTH = 4  # nested configs of multimodal models


def code_is_named(directory: Path) -> bool:
    """True if a config names classes in the repository's own Python files (`auto_map`)."""
    return any(settings.get("auto_map") for settings in _settings(directory))


def names_in_code(directory: Path) -> frozenset[str]:
    """Return the file names that occur in the code of the model's, the tokenizer's and the processor's package."""
    settings = _settings(directory)
    packages = {kind.replace("-", "_") for kind in _model_types(settings[0], _DEPTH)}
    classes = [settings_of.get(key) for settings_of in settings for key in _CLASS_KEYS]
    packages |= {package for name in classes if isinstance(name, str) and (package := _package_of(name))}
    return frozenset(name for package in packages for name in _literals(package))


def _settings(directory: Path) -> list[Mapping[str, Any]]:
    """Return config.json and the tokenizer's and processor's settings; damaged ones are refused elsewhere by name."""
    found: list[Mapping[str, Any]] = []
    for name in ("config.json", *_SETTINGS):
        try:
            found.append(read_json(directory / name, "") if (directory / name).exists() else {})
        except LoftqError:
            found.append({})
    return found


def _model_types(config: Mapping[str, Any], depth: int) -> set[str]:
    kinds = {kind} if isinstance(kind := config.get("model_type"), str) else set()
    for value in config.values() if depth else ():
        if isinstance(value, Mapping):
            kinds |= _model_types(value, depth - 1)
    return kinds


@cache
def _package_of(name: str) -> str | None:
    """Return the package below `transformers.models` that defines a class of transformers."""
    import transformers

    try:
        found = getattr(transformers, name)
    except Exception:  # an unknown name, or a library that the class needs is missing
        return None
    parts = str(getattr(found, "__module__", "")).split(".")
    return parts[2] if isinstance(found, type) and parts[:2] == ["transformers", "models"] else None


@cache
def _literals(package: str) -> frozenset[str]:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not re.fullmatch(r"\w+", package):
        return frozenset()
    folder = Path(spec.submodule_search_locations[0]) / "models" / package
    return frozenset(_names_in(file for file in folder.glob("*.py") if not file.name.startswith("convert_")))


def _names_in(files: Iterable[Path]) -> set[str]:
    return {name for file in files for name in _FILE_LITERAL.findall(file.read_text(encoding="utf-8"))}
