"""Refusals and notes that depend on all units of a plan together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loftq_cli.errors import UsageError
from loftq_cli.formats import get_container, get_format
from loftq_cli.formats.base import QuantizedMatrix, Request
from loftq_cli.machine.sizes import size_text
from loftq_cli.modules.reasons import Why
from loftq_cli.planning.select import Decision
from loftq_cli.planning.units import UNWEIGHTED, Unit
from loftq_cli.recipe.model import Recipe

_MUCH = 50_000_000  # bytes of second moments that are worth a note


def refuse_together(matrices: Sequence[QuantizedMatrix], recipe: Recipe, request: Request) -> None:
    """Let the container check the output as a whole: the model (no matrices yet), or these matrices in one file.

    Raises:
        UsageError: it cannot hold them; the message names a format that can.
    """
    reason = get_format(recipe.format).refuse(matrices, request)
    if reason is not None:
        raise UsageError(f"this model does not fit --format {recipe.format}: {reason}.")


def refuse_nothing(units: Sequence[Unit], recipe: Recipe) -> None:
    """
    Raises:
        UsageError: the container can hold none of the selected matrices.
    """
    if not any(unit.matrix is not None for unit in units):
        reasons = {str(unit.reason) for unit in units if unit.target is not None}
        raise UsageError(
            f"this model has nothing that fits --format {recipe.format} ({'; '.join(sorted(reasons))}): use --format "
            "packed or --format dense."
        )


def expert_notes(units: Sequence[Unit], recipe: Recipe) -> list[str]:
    """Return a note on how the container treats experts."""
    quantized = [unit for unit in units if unit.kind == "expert" and unit.matrix is not None]
    if quantized and (text := get_container(recipe.format).loaded_experts):
        return [f"{len(quantized)} matrices of experts are {text}"]
    refused = [unit for unit in units if unit.kind == "expert" and unit.reason and unit.reason.why is Why.REFUSED]
    if refused and recipe.experts == "quantize" and not get_format(recipe.format).holds_stacked_experts:
        return [
            f"{len(refused)} matrices of experts stay in full precision, because {recipe.format} cannot hold them: "
            "--format packed or dense quantizes them, --experts require stops here instead."
        ]
    return []


def calibration_notes(units: Sequence[Unit], recipe: Recipe) -> list[str]:
    """Return a note on the quantized matrices that calibration does not cover."""
    if recipe.calibrate is None:
        return []
    return [*_moment_notes(units, recipe), *_unseen_notes(units)]


def _moment_notes(units: Sequence[Unit], recipe: Recipe) -> list[str]:
    """Return a note on the memory for all covariances, if it is much."""
    seen = [unit.matrix for unit in units if unit.matrix is not None and unit.kind not in UNWEIGHTED]
    size = 4 * max((matrix.in_features for matrix in seen), default=0) ** 2
    if recipe.calibrate_kind != "full" or size < _MUCH:
        return []
    return [f"the second moments of one layer's inputs take up to {size_text(size)}, in float32."]


def _unseen_notes(units: Sequence[Unit]) -> list[str]:
    aside = [unit for unit in units if unit.kind in UNWEIGHTED and unit.matrix is not None]
    if not aside:
        return []
    kinds = " and ".join(sorted({"experts" if unit.kind == "expert" else "embeddings" for unit in aside}))
    return [f"{len(aside)} matrices of {kinds} are fitted without weights: calibration sees inputs of linear layers."]


def dense_experts(units: Sequence[Unit]) -> tuple[str, ...]:
    """Return the tensors of single experts that stay in full precision."""
    return tuple(
        unit.tensor
        for unit in units
        if unit.kind == "expert" and unit.matrix is None and len(unit.source.shape) == 2 and not unit.backbone[0].whole
    )


def rank_notes(units: Sequence[Unit]) -> list[str]:
    """Return a note on adapters with at least as many parameters as the matrix that they serve."""
    large = [
        unit
        for unit in units
        if unit.matrix is not None and unit.target is not None and 2 * unit.target.rank > min(unit.matrix.shape)
    ]
    if not large:
        return []
    first = min(large, key=lambda unit: min(unit.matrix.shape) if unit.matrix else 0)
    assert first.target is not None and first.matrix is not None
    return [
        f"rank {first.target.rank} is more than half of the smaller side of {first.tensor} {list(first.matrix.shape)}"
        f"{f' and {len(large) - 1} more' if len(large) > 1 else ''}: such an adapter can be larger than what it serves."
    ]


def level_notes(recipe: Recipe, decisions: Mapping[str, Decision]) -> list[str]:
    """Return a note on levels that some matrices cannot have. `recipe` has all its defaults resolved."""
    if recipe.data_type in ("nf", "nf-sym") and any(decision.bits == 8 for decision in decisions.values()):
        return [f"'{recipe.codebook_type}' has no 8-bit codebook: 8-bit matrices take 'uniform' levels."]
    return []
