"""Read YAML recipes safely: plain values only, no objects, and a bound on size and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError

# Keys of a YAML file beside the recipe: where the output goes. They change no byte, so they are not in `loftq.yaml`.
PLACES = ("output", "push_to")
MATRIX = "matrix"  # the key for combinations in `loftq batch`

_MAX_YAML, _DEEPEST = 1_000_000, 100


def read_places(config: Path | None) -> dict[str, str]:
    """Return the `PLACES` that a YAML recipe sets.

    Raises:
        UsageError: the file cannot be read, or a place is not a string.
    """
    values = {} if config is None else read_one(config)
    found = {name: values[name] for name in PLACES if values.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{name} in {config} cannot be {value!r}: give a non-empty string.")
    return found


def read_one(config: Path) -> dict[str, Any]:
    """Return the fields of a YAML file that contains a single recipe.

    Raises:
        UsageError: the file cannot be read, or contains several recipes.
    """
    values = read_yaml(config)
    if MATRIX in values:
        raise UsageError(f"{config} contains several recipes (matrix:): run it with `loftq batch {config}`.")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML recipe; tags that create objects are refused.

    Raises:
        UsageError: the file cannot be read or is not a mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml(path, text)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' per line.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of values such as 2001-99-99 and !!bool x
        raise UsageError(f"a value in {path} is invalid ({' '.join(str(error).split())}): correct it.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{path} is not a recipe: write one 'name: value' per line, such as 'bits: 2'.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _check_yaml(path: Path, text: str) -> None:
    """Refuse long or deep files first: the parser takes time quadratic in the depth before it refuses them."""
    depth = deepest = 0
    for character in text if len(text) <= _MAX_YAML else "":
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if len(text) > _MAX_YAML or deepest > _DEEPEST or "- " * _DEEPEST in text or "? " * _DEEPEST in text:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' per line.")
