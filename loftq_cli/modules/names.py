"""From tensor names on disk to a model's parameter names, as transformers' own loading would take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RuntimeName:
    """Where transformers puts one tensor of the checkpoint.

    Attributes:
        key: parameter name in the model; None when transformers ignores the tensor.
        pieces: every parameter the tensor becomes (part of); more than one when a fused matrix is split.
        merged: the tensor is stacked, split or transposed on the way (a `WeightConverter`), so on disk and in the
            model it is not the same matrix.
        conversion: what is done on the way; None where nothing is.
    """

    key: str | None
    pieces: tuple[str, ...]
    merged: bool
    conversion: Conversion | None = None


@dataclass(frozen=True)
class Conversion:
    """One tensor's share in a `WeightConverter`.

    Attributes:
        operations: transformers' own objects, in order.
        source, sources: which of how many name patterns the tensor matches (gate and up are two).
        position: its place among the tensors of that pattern that become one parameter, such as the expert's number.
    """

    operations: tuple[Any, ...]
    source: int
    sources: int
    position: int


def runtime_names(model: PreTrainedModel, tensors: Sequence[str]) -> tuple[dict[str, RuntimeName], list[str]]:
    """Names on disk -> parameter names, as `from_pretrained` would assign them.

    Uses transformers' own conversion mapping (semi-public: PEFT imports the same functions); where it is gone, a name
    has to match exactly or but for the base model's prefix.

    Returns:
        One `RuntimeName` per tensor, and notes for the user.
    """
    state = model.state_dict()
    notes: list[str] = []
    try:
        rename, order = _transformers_rename(model, state)
    except ImportError:
        rename, order = _plain_rename(model, state), str
        notes.append("transformers' conversion mapping was not found: tensors were matched by name only")
    # Some renamings wait for a first key and rely on transformers' loading order, as does the order of experts.
    return {name: rename(name) for name in sorted(tensors, key=order)}, notes


def _transformers_rename(
    model: PreTrainedModel, state: dict[str, Any]
) -> tuple[Callable[[str], RuntimeName], Callable[[str], Any]]:
    """The renaming of `core_model_loading.convert_and_load_state_dict_in_model`, without the loading.

    Raises:
        ImportError: this transformers has not got the functions.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    # Fresh for every call: the transforms remember which keys they have seen.
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    seen: Counter[tuple[str, str]] = Counter()

    def rename(name: str) -> RuntimeName:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:  # saved by a newer version: the name is the model's already
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key not in state:
            return RuntimeName(None, (), False)
        if pattern is None:
            return RuntimeName(key, (key,), False)
        entry = by_pattern[pattern]
        targets, sources = entry.target_patterns, entry.source_patterns
        position = seen[key, pattern]
        seen[key, pattern] += 1
        conversion = Conversion(tuple(entry.operations), sources.index(pattern), len(sources), position)
        return RuntimeName(key, tuple(key.replace(targets[0], target) for target in targets), True, conversion)

    return rename, dot_natural_key


def _plain_rename(model: PreTrainedModel, state: Mapping[str, Any]) -> Callable[[str], RuntimeName]:
    """Exact name, or the name with the base model's prefix added or taken away."""
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> RuntimeName:
        for key in (name, prefix + name, name.removeprefix(prefix)):
            if key in state:
                return RuntimeName(key, (key,), False)
        return RuntimeName(None, (), False)

    return rename
