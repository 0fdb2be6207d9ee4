"""YAML recipes as they are read: plain fields, and nothing that would build objects or take forever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError

# What a YAML file may say beside the recipe: where the output goes. It decides no byte, so it is not in `loftq.yaml`.
PLACES = ("output", "push_to")
MATRIX = "matrix"  # of a file for `loftq batch`

_MAX_YAML, _DEEPEST = 1_000_000, 100


def read_places(config: Path | None) -> dict[str, str]:
    """What a YAML recipe says of `PLACES`; what it does not say is left out.

    Raises:
        UsageError: the file cannot be read, or a place is no text.
    """
    values = {} if config is None else read_one(config)
    found = {name: values[name] for name in PLACES if values.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{name} in {config} cannot be {value!r}: give a text.")
    return found


def read_one(config: Path) -> dict[str, Any]:
    """The fields of a YAML file that stands for one recipe.

    Raises:
        UsageError: the file cannot be read, or stands for several.
    """
    values = read_yaml(config)
    if MATRIX in values:
        raise UsageError(f"{config} stands for several recipes (matrix:): run it with `loftq batch {config}`.")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML recipe; tags that would build objects are refused.

    Raises:
        UsageError: the file is missing or is no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml(path, text)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' a line.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of values such as 2001-99-99 and !!bool x
        raise UsageError(f"a value in {path} makes no sense ({' '.join(str(error).split())}): correct it.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{path} is no recipe: write one 'name: value' a line, such as 'bits: 2'.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _check_yaml(path: Path, text: str) -> None:
    """The parser's time grows with the square of the depth, and its own refusals come late."""
    depth = deepest = 0
    for character in text if len(text) <= _MAX_YAML else "":
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if len(text) > _MAX_YAML or deepest > _DEEPEST or "- " * _DEEPEST in text or "? " * _DEEPEST in text:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' a line.")
