"""Read YAML recipes safely: plain values only, no objects, and a bound on size and depth."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError

# Keys of a YAML file beside the recipe: where the output goes. They change no byte, so they are not in `loftq.yaml`.
PLACES = ("output", "push_to")
MATRIX = "matrix"  # the key for combinations in `loftq batch`

_MAX_YAML, _DEEPEST = 1_000_000, 100
_FROM_PIPES: dict[tuple[int, int], bytes] = {}  # the text of the last pipe, which cannot be read twice
_SHELL_FILES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def check_text(text: str, name: str) -> str:
    """Return the text unless it has lone surrogates or null characters: YAML can hold them, files and paths cannot.

    Raises:
        UsageError: it has; the sentence names the field `name`.
    """
    if text.encode("utf-8", "replace").decode() != text or "\0" in text:
        raise UsageError(f"{name} contains an invalid character: correct {text!r:.80}.")
    return text


def read_places(config: Path | None) -> dict[str, str]:
    """Return the `PLACES` that a YAML recipe sets.

    Raises:
        UsageError: the file cannot be read, or a place is not a string.
    """
    values = {} if config is None else read_one(config)
    found = {name: values[name] for name in PLACES if values.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{name} in {config} cannot be {value!r:.80}: give a non-empty string.")
        check_text(value, name)
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
        text = _read_text(path)
        _check_yaml(path, text)
        content = _loaded(text)
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


def _loaded(text: str) -> Any:
    """Return what `yaml.safe_load` does, unless aliases make it too large: 30 of them can stand for 10**30 values.

    Raises:
        RecursionError: it is too large or too deep.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _extent(root, {})[0] > _MAX_YAML:
            raise RecursionError
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _extent(node: Any, known: dict[int, tuple[int, int]], above: int = 0) -> tuple[int, int]:
    """Return how many characters and items a YAML node stands for with all aliases written out, and its depth."""
    if above > _DEEPEST:
        raise RecursionError
    if isinstance(node.value, str):
        return 1 + len(node.value), 0
    if id(node) not in known:
        inside = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        found = [_extent(part, known, above + 1) for part in inside]
        known[id(node)] = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
    if above + known[id(node)][1] > _DEEPEST:
        raise RecursionError
    return known[id(node)]


def place_of(path: Path, name: str) -> str:
    """Return where a YAML file sets a field, `recipe.yaml, line 3`; only the file's name if that cannot be found."""
    import yaml

    try:
        root = yaml.compose(_read_text(path), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return str(path)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    lines = [key.start_mark.line + 1 for key, _ in pairs if str(key.value).replace("-", "_") == name]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _read_text(path: Path) -> str:
    """Read the file, but no more of it than `_check_yaml` accepts. A FIFO is read only if the shell has made it, and
    once: its text is kept for the next call."""
    given_by_shell = str(path).startswith(_SHELL_FILES)
    with open(path, "rb", opener=None if given_by_shell else _without_waiting) as file:
        if not given_by_shell and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UsageError(f"the recipe {path} cannot be read: it is not a regular file.")
        found = os.fstat(file.fileno())
        pipe = (found.st_dev, found.st_ino) if stat.S_ISFIFO(found.st_mode) else None
        content = _FROM_PIPES.get(pipe) if pipe else None
        if content is None:
            content = file.read(_MAX_YAML * 4 + 1)
        if pipe:
            _FROM_PIPES.clear()
            _FROM_PIPES[pipe] = content
        return content.decode("utf-8")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _check_yaml(path: Path, text: str) -> None:
    """Refuse long or deep files first: the parser takes time quadratic in the depth before it refuses them."""
    depth = deepest = 0
    for character in text if len(text) <= _MAX_YAML else "":
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if len(text) > _MAX_YAML or deepest > _DEEPEST or "- " * _DEEPEST in text or "? " * _DEEPEST in text:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' per line.")
