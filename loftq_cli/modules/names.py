"""Map tensor names on disk to a model's parameter names, exactly as transformers' own loading does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RuntimeName:
    """The parameter that transformers loads one tensor of the checkpoint into.

    Attributes:
        key: parameter name in the model; None if transformers ignores the tensor.
        pieces: every parameter that the tensor becomes, or becomes part of; several if a fused matrix is split.
        merged: a `WeightConverter` stacks, splits or transposes the tensor, so that the matrix on disk and the one in
            the model differ.
        conversion: the operations applied; None if there are none.
    """

    key: str | None
    pieces: tuple[str, ...]
    merged: bool
    conversion: Conversion | None = None


@dataclass(frozen=True)
class Conversion:
    """One tensor's part in a `WeightConverter`.

    Attributes:
        operations: transformers' own objects, in order.
        source, sources: index of the name pattern that the tensor matches, and number of patterns (gate and up are
            two).
        position: its index among the tensors of that pattern that become one parameter, such as the expert's number.
    """

    operations: tuple[Any, ...]
    source: int
    sources: int
    position: int


def runtime_names(model: PreTrainedModel, tensors: Sequence[str]) -> tuple[dict[str, RuntimeName], list[str]]:
    """Map names on disk to parameter names as `from_pretrained` would.

    Uses transformers' own conversion mapping (semi-public: PEFT imports the same functions); if that is missing, a name
    must match exactly, with or without the base model's prefix.

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
    # Some renamings depend on the keys seen before, and experts on their order: use transformers' loading order.
    return {name: rename(name) for name in sorted(tensors, key=order)}, notes


def _transformers_rename(
    model: PreTrainedModel, state: dict[str, Any]
) -> tuple[Callable[[str], RuntimeName], Callable[[str], Any]]:
    """Return the renaming of `core_model_loading.convert_and_load_state_dict_in_model` without the loading.

    Raises:
        ImportError: this version of transformers does not have the functions.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    # Created for every call, because the transforms remember the keys they have seen.
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    seen: Counter[tuple[str, str]] = Counter()

    def rename(name: str) -> RuntimeName:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:  # saved by a newer version: already the model's name
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
    """Match the exact name, or the name with the base model's prefix added or removed."""
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> RuntimeName:
        for key in (name, prefix + name, name.removeprefix(prefix)):
            if key in state:
                return RuntimeName(key, (key,), False)
        return RuntimeName(None, (), False)

    return rename
