"""Module paths across classes: `model.layers.0` in one class of a family is `layers.0` in another."""

from __future__ import annotations

from collections.abc import Container


def find_path(path: str, present: Container[str], base_model_prefix: str) -> str | None:
    """Find a module of the converted class in another class of the same family.

    Args:
        path: as in the class that the checkpoint was converted with.
        present: module paths of the other class.
        base_model_prefix: attribute of the backbone in classes with a head, e.g. `model`.

    Returns:
        The first of `path`, `path` with the prefix, and `path` without it that is present; None if none is.
    """
    candidates = [path]
    if base_model_prefix:
        candidates.append(f"{base_model_prefix}.{path}")
        if path.startswith(f"{base_model_prefix}."):
            candidates.append(path.removeprefix(f"{base_model_prefix}."))
    return next((candidate for candidate in candidates if candidate in present), None)
