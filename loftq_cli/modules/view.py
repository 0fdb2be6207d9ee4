"""Facts about a model on the meta device that concern all tensors: ties, towers, float32 lists, readers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.modules import keep_rules as rules
from loftq_cli.modules.keep_rules import Tower
from loftq_cli.modules.weight_reads import ReadKind, direct_weight_reads, partial_weight_reads

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from loftq_cli.modules.names import RuntimeName


@dataclass(frozen=True)
class ModelView:
    """The facts about a model that are needed to classify its tensors; created once per model.

    Attributes:
        modules: path -> module, shared modules under each of their paths.
        state: parameter or buffer name -> tensor on the meta device.
        parameters: the names in `state` that are parameters.
        tied: parameter name -> the parameter it shares its values with, both ways.
        float32: matches the names of tensors that transformers keeps in float32.
        float32_dtypes: from `float32_patterns`.
        readers: module path -> class that reads its weight (`modules.weight_reads`).
        unquantized_readers, dtype_readers: the same for classes that read it only in a model without a quantizer, and
            for classes that read its dtype alone.
        expert_names: last parts of module paths that PEFT treats as fused experts.
        heads, embedding: paths of the output embeddings and of the input embedding.
        base: path prefix of the base model, "" if the class is a base model or has none.
        towers: path prefix -> tower, longest first; `outside` is the tower of the rest.
    """

    model: PreTrainedModel
    modules: Mapping[str, nn.Module]
    state: Mapping[str, torch.Tensor]
    parameters: frozenset[str]
    tied: Mapping[str, str]
    float32: re.Pattern[str] | None
    float32_dtypes: Mapping[str, re.Pattern[str]]
    readers: Mapping[str, str]
    unquantized_readers: Mapping[str, str]
    dtype_readers: Mapping[str, str]
    expert_names: frozenset[str]
    heads: frozenset[str]
    embedding: frozenset[str]
    base: str
    towers: tuple[tuple[str, Tower], ...]
    outside: Tower

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelView:
        modules = dict(model.named_modules(remove_duplicate=False))
        heads = _paths(modules, _call_getter(model, "get_output_embeddings"))
        towers, outside = _towers(model)
        prefix = model.base_model_prefix
        return cls(
            model=model,
            modules=modules,
            state=model.state_dict(),
            parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
            tied=_ties(model, modules),
            float32=float32_patterns(model).get("float16"),
            float32_dtypes=float32_patterns(model),
            readers=direct_weight_reads(model, model.config),
            unquantized_readers=partial_weight_reads(model, ReadKind.UNQUANTIZED),
            dtype_readers=partial_weight_reads(model, ReadKind.DTYPE),
            expert_names=expert_names(model),
            heads=heads,
            embedding=_paths(modules, _call_getter(model, "get_input_embeddings")),
            base=f"{prefix}." if prefix and model.base_model is not model else "",
            towers=towers,
            outside=outside,
        )

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def linear_modules(self) -> tuple[str, ...]:
        """Return the paths of all Linear and Conv1D modules, in the model's order."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        return tuple(path for path, module in self.modules.items() if isinstance(module, nn.Linear | Conv1D))

    def sharing(self, key: str) -> frozenset[str]:
        """Return the other parameters that share a parameter's values."""
        ties = self.model.all_tied_weights_keys
        source = ties.get(key, key)
        found = {source, *(target for target, other in ties.items() if other == source), self.tied.get(key, key)}
        return frozenset(found - {key})

    @property
    def rebuilt_for(self) -> frozenset[str]:
        """Return the quantization methods for which transformers replaces some of these modules (Llama 4)."""
        try:
            from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
        except ImportError:
            return frozenset()
        patches: Mapping[str, Any] = MODULES_TO_PATCH_FOR_QUANTIZATION
        classes = {type(module).__name__ for module in self.modules.values()} & patches.keys()
        return frozenset(method.value for name in classes for method in patches[name]["quantization_methods"])

    def tower(self, path: str) -> Tower:
        """Return the innermost tower around a module; heads and the embedding table belong to the text tower."""
        hit = next((tower for prefix, tower in self.towers if f"{path}.".startswith(f"{prefix}.")), None)
        return hit or ("text" if path in self.heads | self.embedding else self.outside)

    def expects_unknown(self, tensor: str) -> bool:
        """True if transformers lists this name among those that it ignores without a warning."""
        return any(re.search(pattern, tensor) for pattern in self.model._keys_to_ignore_on_load_unexpected or ())

    def missing(self, names: Iterable[RuntimeName]) -> tuple[str, ...]:
        """Return the matrix parameters that no tensor of the checkpoint fills, in the model's order."""
        filled = {piece for name in names for piece in name.pieces}
        filled |= {self.tied[piece] for piece in filled if piece in self.tied}
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        targets = self.model.all_tied_weights_keys  # report a missing tied tensor once, under its source's name
        return tuple(
            name
            for name, tensor in self.state.items()
            if tensor.ndim > 1
            and name in self.parameters
            and name not in filled
            and name not in targets
            and not any(re.search(pattern, name) for pattern in ignored)
        )


def _call_getter(model: PreTrainedModel, getter: str) -> nn.Module | None:
    """Return a model's input or output embedding; some classes raise instead of returning None."""
    try:
        module: nn.Module | None = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    return module


def _paths(modules: Mapping[str, nn.Module], wanted: nn.Module | None) -> frozenset[str]:
    """Return every path of a module, or of its members if it is a ModuleList (Musicgen has one head per codebook)."""
    from torch import nn

    members = set(wanted if isinstance(wanted, nn.ModuleList) else [wanted]) - {None}
    return frozenset(path for path, module in modules.items() if module in members)


def _ties(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map a parameter's name to one it is tied to: by transformers' list, or because two paths share a module."""
    ties: dict[str, str] = {}
    heads = {f"{path}.weight" for path in _paths(modules, _call_getter(model, "get_output_embeddings"))}
    # The head first: if several parameters share one table, that is the tie a user knows.
    for target, source in sorted(model.all_tied_weights_keys.items(), key=lambda tie: tie[0] not in heads):
        ties.setdefault(source, target)
        ties[target] = source
    first: dict[int, str] = {}
    for path, module in modules.items():
        other = first.setdefault(id(module), path)
        if other != path and "weight" in module._parameters:
            ties.setdefault(f"{path}.weight", f"{other}.weight")
            ties.setdefault(f"{other}.weight", f"{path}.weight")
    return ties


def float32_patterns(model: PreTrainedModel) -> dict[str, re.Pattern[str]]:
    """Return a pattern for the tensors that stay in float32 if the model is loaded in another dtype, by that dtype.

    transformers (`_get_dtype_plan`) uses both of its lists for float16 but only the strict one for bfloat16, and
    matches them anywhere in a tensor's name.
    """
    strict = {*(model._keep_in_fp32_modules_strict or ())}
    lists = {"float16": strict | {*(model._keep_in_fp32_modules or ())}, "bfloat16": strict}
    return {
        dtype: re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in sorted(patterns)))
        for dtype, patterns in lists.items()
        if patterns
    }


def expert_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the last parts of module paths that PEFT takes for experts (`keep_rules.PEFT_EXPERT_NAMES`).

    For such a model PEFT also reduces a pattern in `target_modules` to last parts. Empty for other models, or if
    transformers lacks the table that PEFT uses.
    """
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    except ImportError:
        return frozenset()
    return rules.PEFT_EXPERT_NAMES.get(PATTERNS.get(model.config.model_type, ""), frozenset())


def _towers(model: PreTrainedModel) -> tuple[tuple[tuple[str, Tower], ...], Tower]:
    """Return the tower of each sub-model of a multimodal model, longest path first, and the tower of everything else.

    Only a class that takes text and another modality has towers; a vision model with a vision backbone has none.
    """
    modalities = _modalities(model)
    if "text" not in modalities or len(modalities) < 2:
        return (), "text"
    keys = _sub_config_keys(model.config)
    towers: dict[str, Tower] = {}
    for path, module in model.named_modules():
        key = keys.get(id(getattr(module, "config", None)))
        if path and key is not None and hasattr(module, "input_modalities"):
            towers[path] = _tower(key, _modalities(module))
    innermost_first = tuple(sorted(towers.items(), key=lambda item: -len(item[0])))
    return innermost_first, "other" if "text" in towers.values() else "text"


def _modalities(module: nn.Module) -> set[str]:
    declared = getattr(module, "input_modalities", "text")
    return {declared} if isinstance(declared, str) else set(declared)


def _sub_config_keys(config: Any) -> dict[int, str]:
    """Map the id of every config inside a config to its key; the caller keeps the configs alive."""
    keys: dict[int, str] = {}
    for key in getattr(config, "sub_configs", ()):
        inner = getattr(config, key, None)
        if inner is not None:
            keys |= {id(inner): key} | _sub_config_keys(inner)
    return keys


def _tower(key: str, modalities: set[str]) -> Tower:
    """Choose the tower by the sub-config's name, or else by the sub-model's input modalities."""
    for word, tower in rules.TOWER_WORDS:
        if word in key:
            return tower
    if "text" in modalities:
        return "text"
    return "audio" if modalities == {"audio"} else "vision"
