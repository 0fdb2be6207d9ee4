"""What a plan refuses, and what it tells the user before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from loftq_cli.checkpoint import Checkpoint
from loftq_cli.checkpoint.scaled import quantization_of
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats import get_format
from loftq_cli.formats.base import QuantizedMatrix, Request
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.planning.select import Decision, unused_filters
from loftq_cli.planning.units import Unit
from loftq_cli.recipe.model import Recipe

_PACKED = (".qweight", ".weight_packed", ".SCB", ".absmax", ".W_q")  # names that only quantized weights have


def refuse_together(matrices: Sequence[QuantizedMatrix], recipe: Recipe, request: Request) -> None:
    """What the container cannot hold as a whole: the model (no matrices yet), or these matrices in one file.

    Raises:
        UsageError: it cannot; the sentence names a format that can.
    """
    reason = get_format(recipe.format).refuse(matrices, request)
    if reason is not None:
        raise UsageError(f"this model does not fit --format {recipe.format}: {reason}.")


def refuse_nothing(units: Sequence[Unit], recipe: Recipe) -> None:
    """A container that holds none of the matrices that were asked for.

    Raises:
        UsageError: there is no matrix left.
    """
    if not any(unit.matrix is not None for unit in units):
        reasons = {unit.reason for unit in units if unit.target is not None}
        raise UsageError(
            f"this model has nothing that fits --format {recipe.format} ({'; '.join(sorted(reasons))}): use --format "
            "packed or --format dense."
        )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """A source that is quantized already, by its config.json or by the names of its tensors.

    Raises:
        LoftqError: it is.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is None and not any(name.endswith(_PACKED) for name in checkpoint.tensors):
        return
    method = (quantization or {}).get("quant_method", "some method")
    name = checkpoint.config.get("_name_or_path")
    where = f", perhaps {name}" if name and Path(str(name)) != checkpoint.path else ""
    raise LoftqError(
        f"{checkpoint.path} is already quantized ({method}): give the full-precision model it was made from{where}."
    )


def refuse_unsound(checkpoint: Checkpoint, modules: ModuleMap, recipe: Recipe) -> None:
    """Without a model class matrices are chosen by name only where the user chooses them; and a model of which layers
    are missing is damaged. Heads and poolers may be missing: transformers starts them anew.

    Raises:
        LoftqError: there is no class and no choice, or a layer's tensor is missing.
    """
    if modules.architecture is None and not recipe.include:
        raise LoftqError(
            f"{checkpoint.path}: {modules.notes[0].split(': matrices were chosen')[0]}; check config.json or upgrade "
            "transformers, or give --include '*' to choose matrices by name and shape."
        )
    lost = [name for name in modules.missing if re.search(r"\.\d+\.", name)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise LoftqError(
            f"{checkpoint.path} lacks {lost[0]}{more}, which {modules.architecture} built from config.json has: finish "
            "the download, or check that config.json belongs to these weights."
        )


def source_notes(recipe: Recipe, modules: ModuleMap, nonfinite: Mapping[str, str] | None) -> list[str]:
    """What there is to say before units are made. `nonfinite` as in `make_plan`."""
    return [
        *modules.notes,
        *_missing_notes(modules),
        *_filter_notes(recipe, modules),
        *_nonfinite_notes(recipe, nonfinite),
    ]


def _missing_notes(modules: ModuleMap) -> list[str]:
    return [f"the checkpoint has no {name}: transformers will start it at random." for name in modules.missing]


def _filter_notes(recipe: Recipe, modules: ModuleMap) -> list[str]:
    return [f"{text} matches no module of this model." for text in unused_filters(recipe, modules.roles)]


def _nonfinite_notes(recipe: Recipe, nonfinite: Mapping[str, str] | None) -> list[str]:
    if nonfinite:
        return [f"{name} {reason} and stays in full precision." for name, reason in nonfinite.items()]
    if recipe.allow_nonfinite and nonfinite is None:
        return ["no weight was read: a matrix that holds NaN or infinity will stay in full precision."]
    return []


def level_notes(recipe: Recipe, decisions: Mapping[str, Decision]) -> list[str]:
    """Levels that some matrices cannot have. `recipe` is the resolved one."""
    if recipe.data_type in ("nf", "nf-sym") and any(decision.bits == 8 for decision in decisions.values()):
        return [f"'{recipe.codebook_type}' has no 8-bit codebook: 8-bit matrices take 'uniform' levels."]
    return []
