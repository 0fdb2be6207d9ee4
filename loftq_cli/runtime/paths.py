"""Module paths across classes: what is `model.layers.0` in one class of a family is `layers.0` in another."""

from __future__ import annotations

from collections.abc import Container


def find_path(path: str, present: Container[str], base_model_prefix: str) -> str | None:
    """Where a module of the converted class stands in another class of the same family.

    Args:
        path: as in the class the checkpoint was converted with.
        present: module paths of the class at hand.
        base_model_prefix: what transformers puts before the backbone in classes with a head, e.g. `model`.

    Returns:
        The first of `path`, `path` with the prefix, `path` without it that is present; None where none is.
    """
    candidates = [path]
    if base_model_prefix:
        candidates.append(f"{base_model_prefix}.{path}")
        if path.startswith(f"{base_model_prefix}."):
            candidates.append(path.removeprefix(f"{base_model_prefix}."))
    return next((candidate for candidate in candidates if candidate in present), None)
