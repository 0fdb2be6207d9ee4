"""What `auto` stands for: container, levels, group and scales, settled before anything is planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from loftq_cli.errors import UsageError
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.planning.select import Decision
from loftq_cli.recipe.model import Recipe

INTEGER_FORMATS = ("gptq", "gptq-v2", "compressed-tensors", "gguf")  # they hold nothing but integers
_GROUP_SIZES = {"gguf": 32}  # the only one it has
_GROUP_SIZE = 64
_POOLING_FORMATS = ("auto", "packed", "gptq", "gptq-v2", "dense")
_POOLING_GROUP = 32  # QA-LoRA section 4.1


def resolve(recipe: Recipe, modules: ModuleMap, decisions: Mapping[str, Decision]) -> Recipe:
    """The recipe with every `auto` settled.

    Raises:
        UsageError: flags of one kind of levels were given with the other kind.
    """
    if recipe.method == "qa-lora":
        recipe = _pooled(recipe)
    data_type = recipe.data_type
    if data_type == "auto":
        data_type = "int" if recipe.format in INTEGER_FORMATS else "nf"
    if data_type != "int":
        _refuse_integer_flags(recipe, data_type)
    recipe = dataclasses.replace(recipe, data_type=data_type)
    recipe = dataclasses.replace(recipe, format=_format(recipe, modules, decisions))
    if data_type != "int":
        return dataclasses.replace(recipe, scale="mse" if recipe.method == "refined" else "absmax")
    if recipe.levels:
        raise UsageError(f"--levels {recipe.levels} belongs to codebooks: drop it, or --data-type int.")
    return dataclasses.replace(
        recipe,
        group_size=recipe.group_size or _GROUP_SIZES.get(recipe.format, _GROUP_SIZE),
        scale="mse" if recipe.scale == "auto" else recipe.scale,
        symmetric=recipe.format in ("compressed-tensors", "gguf") if recipe.symmetric is None else recipe.symmetric,
    )


def _pooled(recipe: Recipe) -> Recipe:
    """QA-LoRA's own settings: asymmetric integers in groups that the adapter pools over."""
    if recipe.data_type not in ("auto", "int") or recipe.symmetric:
        raise UsageError("--method qa-lora needs asymmetric integers: drop --data-type and --symmetric.")
    if recipe.group_size is not None and recipe.group_size < 2:
        raise UsageError("--method qa-lora pools over groups: give --group-size 32, 64 or 128.")
    if recipe.format not in _POOLING_FORMATS:
        raise UsageError(
            f"--method qa-lora trains on --format {', '.join(_POOLING_FORMATS[1:])}; {recipe.format} has no layer for "
            "it."
        )
    if recipe.embeddings == "adapt":
        raise UsageError("--method qa-lora pools the inputs of linear layers: use --embeddings keep or quantize.")
    form = "packed" if recipe.format == "auto" else recipe.format
    return dataclasses.replace(
        recipe, data_type="int", symmetric=False, group_size=recipe.group_size or _POOLING_GROUP, format=form
    )


def _format(recipe: Recipe, modules: ModuleMap, decisions: Mapping[str, Decision]) -> str:
    """`auto`: bitsandbytes where everything is 4-bit NF and it can hold every matrix, else `packed`."""
    if recipe.format != "auto":
        return recipe.format
    beyond = any(role.kind in ("embedding", "expert") and decisions[role.tensor].bits for role in modules.roles)
    widths = {decision.bits for decision in decisions.values() if decision.bits}
    in_nf4 = recipe.codebook_type in ("nf", "nf4-subset")
    return "bnb" if widths == {4} and in_nf4 and not beyond and "bitsandbytes" not in modules.rebuilt_for else "packed"


def _refuse_integer_flags(recipe: Recipe, data_type: str) -> None:
    if recipe.group_size is not None:
        raise UsageError(f"--group-size belongs to integers: give --data-type int, or --block-size for '{data_type}'.")
    if recipe.symmetric is not None:
        raise UsageError("--symmetric and --asymmetric belong to integers: give --data-type int, or drop them.")
    own = "mse" if recipe.method == "refined" else "absmax"
    if recipe.scale not in ("auto", own):
        raise UsageError(
            f"--scale {recipe.scale} does not go with --method {recipe.method} and '{data_type}', whose blocks are "
            f"scaled by {own}: drop it, or give --data-type int."
        )
