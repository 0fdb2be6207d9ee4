"""Resolve every `auto` of a recipe (container, levels, group and scales) before anything is planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from loftq_cli.errors import UsageError
from loftq_cli.formats import FORMATS, choose_container, get_container
from loftq_cli.formats.container import AutoRequest
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.planning.select import Decision
from loftq_cli.recipe.choices import AUTO
from loftq_cli.recipe.model import Recipe

_POOLING_GROUP = 32  # QA-LoRA section 4.1


def resolve(recipe: Recipe, modules: ModuleMap, decisions: Mapping[str, Decision]) -> Recipe:
    """Return the recipe with every `auto` resolved.

    Raises:
        UsageError: a flag for integers was given with a codebook, or the reverse.
    """
    if recipe.method == "qa-lora":
        recipe = _resolve_qalora(recipe)
    data_type = recipe.data_type
    if data_type == "auto":
        data_type = "nf" if recipe.format == AUTO else get_container(recipe.format).data_type
    if data_type != "int":
        _refuse_integer_flags(recipe, data_type)
    recipe = dataclasses.replace(recipe, data_type=data_type)
    recipe = dataclasses.replace(recipe, format=_format(recipe, modules, decisions))
    if data_type != "int":
        return dataclasses.replace(recipe, scale="mse" if recipe.fits_scales else "absmax")
    if recipe.levels:
        raise UsageError(f"--levels {recipe.levels} applies to codebooks only: drop it, or drop --data-type int.")
    container = get_container(recipe.format)
    return dataclasses.replace(
        recipe,
        group_size=recipe.group_size or container.group_size,
        scale="mse" if recipe.scale == "auto" else recipe.scale,
        symmetric=container.symmetric if recipe.symmetric is None else recipe.symmetric,
    )


def _resolve_qalora(recipe: Recipe) -> Recipe:
    """Return the recipe with QA-LoRA's settings: asymmetric integers in groups that the adapter pools over."""
    if recipe.data_type not in ("auto", "int") or recipe.symmetric:
        raise UsageError("--method qa-lora needs asymmetric integers: drop --data-type and --symmetric.")
    if recipe.group_size is not None and recipe.group_size < 2:
        raise UsageError("--method qa-lora pools over groups: give --group-size 32, 64 or 128.")
    if recipe.format != AUTO and not get_container(recipe.format).pools:
        pooling = ", ".join(name for name, container in FORMATS.items() if container.pools)
        raise UsageError(f"--method qa-lora has no layer for --format {recipe.format}: choose one of {pooling}.")
    if recipe.embeddings == "adapt":
        raise UsageError("--method qa-lora pools the inputs of linear layers: use --embeddings keep or quantize.")
    recipe = dataclasses.replace(
        recipe, data_type="int", symmetric=False, group_size=recipe.group_size or _POOLING_GROUP
    )
    return with_container(recipe, (recipe.base_bits,))


def with_container(recipe: Recipe, widths: Collection[int]) -> Recipe:
    """Return the recipe with a container for these bits, if its format is `auto`."""
    if recipe.format != AUTO:
        return recipe
    return dataclasses.replace(recipe, format=choose_container(AutoRequest(widths, recipe.codebook_type)).name)


def _format(recipe: Recipe, modules: ModuleMap, decisions: Mapping[str, Decision]) -> str:
    """Return the recipe's container; `auto` is resolved from the matrices that will be quantized."""
    if recipe.format != AUTO:
        return recipe.format
    widths = {decision.bits for decision in decisions.values() if decision.bits}
    kinds = {role.kind for role in modules.roles if decisions[role.tensor].bits}
    return choose_container(AutoRequest(widths, recipe.codebook_type, kinds, modules.rebuilt_for)).name


def _refuse_integer_flags(recipe: Recipe, data_type: str) -> None:
    if recipe.group_size is not None:
        raise UsageError(
            f"--group-size applies to integers only: give --data-type int, or use --block-size for '{data_type}'."
        )
    if recipe.symmetric is not None:
        raise UsageError("--symmetric and --asymmetric apply to integers only: give --data-type int, or drop them.")
    own = "mse" if recipe.fits_scales else "absmax"
    if recipe.scale not in ("auto", own):
        raise UsageError(
            f"--scale {recipe.scale} does not work with --method {recipe.method} and '{data_type}', whose blocks are "
            f"scaled by {own}: drop it, or give --data-type int."
        )
