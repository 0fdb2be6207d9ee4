"""Module paths across classes: `model.layers.0` in one class of a family is `layers.0` in another."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from loftq_cli.modules.names import runtime_names


def moved_prefixes(model: Any, parameters: Iterable[str]) -> dict[str, str]:
    """Return how transformers moves sub-models of the converted class in the class of `model`, as old -> new prefix.

    The text-only class of a multimodal checkpoint drops a component: `model.language_model.` becomes `model.`.

    Args:
        parameters: names in the converted class.
    """
    state = model.state_dict()
    absent = [name for name in parameters if name not in state]
    if not absent:
        return {}
    names, _ = runtime_names(model, absent)
    moved = {}
    for old, name in names.items():
        before, after = old.split("."), (name.key or old).split(".")
        while before and after and before[-1] == after[-1]:
            before.pop()
            after.pop()
        if before:
            moved[".".join([*before, ""])] = ".".join([*after, ""])
    return moved


def find_path(
    path: str, present: Container[str], base_model_prefix: str, moved: Mapping[str, str] | None = None
) -> str | None:
    """Find a module of the converted class in another class of the same family.

    Args:
        path: as in the class that the checkpoint was converted with.
        present: module paths of the other class.
        base_model_prefix: attribute of the backbone in classes with a head, e.g. `model`.
        moved: from `moved_prefixes`.

    Returns:
        The first of `path`, `path` with the prefix, `path` without it and `path` moved that is present; None if none
        is.
    """
    candidates = [path]
    if base_model_prefix:
        candidates.append(f"{base_model_prefix}.{path}")
        if path.startswith(f"{base_model_prefix}."):
            candidates.append(path.removeprefix(f"{base_model_prefix}."))
    candidates += [new + path.removeprefix(old) for old, new in (moved or {}).items() if path.startswith(old)]
    return next((candidate for candidate in candidates if candidate in present), None)
