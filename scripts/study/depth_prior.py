"""Does a prior over depth improve `--mix optimal`, because errors in the first or last layers matter more?

Every matrix is measured by plain quantization at 2, 3, 4 and 8 bits, its relative squared error times size is weighted
by its layer, and the exact allocation under the mean is applied through `--rule`. Part of `mixed_precision.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loftq_cli
from loftq_cli.budget.allocation import Choices, allocate
from loftq_cli.recipe.model import BITS, exact_rule

MEANS = (2.33, 2.5, 2.67)
STRENGTHS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Measured:
    """A matrix: its layer, and the relative squared error that each width leaves, times its size."""

    module: str
    layer: int
    weights: int
    costs: Mapping[int, float]


def study_priors(
    model: Path, folder: Path, judge: Callable[[Path], Mapping[str, float]], *, rank: int
) -> dict[str, Any]:
    """Return `judge` of the starting point (lower is better) for every prior and mean; equal allocations are converted
    once."""
    matrices = measure(model, folder)
    last = max(matrix.layer for matrix in matrices)
    made: dict[tuple[int, ...], Mapping[str, float]] = {}
    rows = []
    for mean in MEANS:
        for name, weigh in priors(last).items():
            widths = allocated(matrices, weigh, mean)
            if widths not in made:
                rules = [exact_rule(matrix.module, width) for matrix, width in zip(matrices, widths)]
                output = folder / f"{len(made)}"
                loftq_cli.quantize(model, bits=2, rule=rules, format="packed", rank=rank, output=output)
                made[widths] = judge(output)
            rows.append({"prior": name, "bits": mean, **described(matrices, widths), "judged": made[widths]})
            print(rows[-1], flush=True)
    return {"rows": rows, "better_everywhere": better_everywhere(rows), "spread": spread(matrices)}


def measure(model: Path, folder: Path) -> list[Measured]:
    """Return the error of plain quantization for every matrix and width."""
    manifests = {
        width: loftq_cli.quantize(
            model, bits=width, method="qlora", format="packed", rank=1, output=folder / f"plain{width}"
        )
        for width in BITS
    }
    records = manifests[BITS[0]].matrices
    last = max(layer for layer in (_layer(record.module) for record in records) if layer is not None)
    found = []
    for record in records:
        layer, weights = _layer(record.module), math.prod(record.shape)
        left = {width: manifests[width].matrix(record.module).plain_residual for width in BITS}
        costs = {width: value**2 * weights for width, value in left.items()}
        found.append(Measured(record.module, last if layer is None else layer, weights, costs))
    return found


def spread(matrices: Sequence[Measured]) -> dict[str, float]:
    """Return the ratio of the largest to the smallest relative squared error at each width."""
    found = {}
    for width in BITS:
        errors = [matrix.costs[width] / matrix.weights for matrix in matrices]
        found[str(width)] = round(max(errors) / min(errors), 3)
    return found


def _layer(module: str) -> int | None:
    """Return the number of the layer; a pooler is not in a layer and counts as one after the last."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def priors(last: int) -> dict[str, Callable[[int], float]]:
    """Return the weight of an error in each layer, by name of the prior."""
    found: dict[str, Callable[[int], float]] = {"none": lambda layer: 1.0}
    for a in STRENGTHS:
        found[f"first, a = {a:g}"] = lambda layer, a=a: 1 + a * (1 - layer / last)  # type: ignore[misc]
    for a in STRENGTHS:
        found[f"last, a = {a:g}"] = lambda layer, a=a: 1 + a * layer / last  # type: ignore[misc]
    return found


def allocated(matrices: Sequence[Measured], weigh: Callable[[int], float], mean: float) -> tuple[int, ...]:
    """Return the widths with the least weighted error under the mean."""
    items = [
        Choices(
            tuple(matrix.weights * width for width in BITS),
            tuple(weigh(matrix.layer) * matrix.costs[width] for width in BITS),
        )
        for matrix in matrices
    ]
    found = allocate(items, int(mean * sum(matrix.weights for matrix in matrices) + 1e-6))
    assert found is not None, "every mean is above the least width"
    return tuple(BITS[option] for option in found.taken)


def described(matrices: Sequence[Measured], widths: Sequence[int]) -> dict[str, Any]:
    """Return the mean, the unweighted objective, and the mean width of each layer."""
    total = sum(matrix.weights for matrix in matrices)
    layers: dict[int, list[tuple[int, int]]] = {}
    for matrix, width in zip(matrices, widths):
        layers.setdefault(matrix.layer, []).append((width * matrix.weights, matrix.weights))
    return {
        "mean_bits": round(sum(m.weights * width for m, width in zip(matrices, widths)) / total, 4),
        "objective_plain": round(sum(m.costs[width] for m, width in zip(matrices, widths)) / total, 6),
        "layers": [round(sum(b for b, _ in found) / sum(w for _, w in found), 2) for found in layers.values()],
    }


def better_everywhere(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the priors that beat no prior on every text at every mean."""
    none = {row["bits"]: row["judged"] for row in rows if row["prior"] == "none"}
    return [
        prior
        for prior in dict.fromkeys(row["prior"] for row in rows)
        if all(
            value < none[row["bits"]][text]
            for row in rows
            if row["prior"] == prior
            for text, value in row["judged"].items()
        )
    ]
