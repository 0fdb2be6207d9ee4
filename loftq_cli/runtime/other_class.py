"""Layers of another class than the converted one that must stay dense: new heads, and kept layers with other paths.

transformers replaces every linear layer that the container's skip list does not name. The list has the paths of the
converted class, so a head that only the loaded class has would be packed without any weights to fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.modules.build import build_on_meta, named_class
from loftq_cli.runtime.paths import find_path, moved_prefixes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ANY_SIZE = 10**9  # the layers were counted when the model was converted


def other_dense_layers(
    model_class: Any, config: PretrainedConfig, own_config: PretrainedConfig, listed: Sequence[str]
) -> tuple[str, ...]:
    """Return paths of linear layers to add to a skip list; none if the class is the converted one or cannot be built.

    Args:
        model_class: an Auto class or a model class of transformers.
        config: of the checkpoint; `own_config`: of the class, which may be a sub-config of it.
        listed: the entries of the container's skip list.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    fields = config.to_dict()
    name = _class_name(model_class, config)
    if name is None or name == named_class(fields):
        return ()
    converted = build_on_meta(fields, _ANY_SIZE).model
    loaded = build_on_meta({**own_config.to_dict(), "architectures": [name]}, _ANY_SIZE).model
    if converted is None or loaded is None or type(loaded).__name__ != name:
        return ()
    present = frozenset(path for path, _ in loaded.named_modules(remove_duplicate=False))
    moved = moved_prefixes(loaded, (parameter for parameter, _ in converted.named_parameters()))
    prefix = loaded.base_model_prefix
    known = {
        place: path
        for path, _ in converted.named_modules(remove_duplicate=False)
        if (place := find_path(path, present, prefix, moved)) is not None
    }
    kept = frozenset(listed)
    return tuple(
        path
        for path, module in loaded.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | Conv1D) and path not in kept and (path not in known or known[path] in kept)
    )


def _class_name(model_class: Any, config: PretrainedConfig) -> str | None:
    """Return the name of the model class that an Auto class chooses for this config."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        chosen = mapping.get(type(config), None)
        model_class = chosen[0] if isinstance(chosen, list | tuple) else chosen
    return getattr(model_class, "__name__", None)
