"""Which units are converted together: small matrices of equal shape, of which a GPU computes one faster than it is told
what to do.

Sums over a stack may differ in the last bits from those over a matrix alone. So what is put together follows from the
plan alone, and a batch is always computed whole: a run that goes on gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from loftq_cli.numerics.methods.stacked import may_stack
from loftq_cli.planning.units import UNWEIGHTED, Unit
from loftq_cli.recipe.model import Recipe

MOST_BATCHED = 32  # launching a matrix's kernels once for this many leaves them a share that no longer shows
_SMALL_WEIGHTS = 1 << 23  # above, a product takes a GPU longer than its launch
_BATCH_WEIGHTS = 1 << 26  # together: some 2 GB of device memory, which is little for a GPU that holds an LLM


@dataclass(frozen=True)
class Batch:
    """Units that are read and converted together; most have one.

    Attributes:
        todo: those of them that are written; an earlier run has finished the others.
    """

    units: tuple[Unit, ...]
    todo: tuple[Unit, ...]

    @staticmethod
    def of(*units: Unit) -> Batch:
        """With nothing finished yet."""
        return Batch(units, units)


def form_batches(
    units: Iterable[Unit], recipe: Recipe, most: int, finished: Collection[str] = frozenset()
) -> list[Batch]:
    """All units of a plan in batches of at most `most`, in the order of the source's files; without those batches whose
    units, by tensor name, are all `finished`."""
    full: list[list[Unit]] = []
    growing: dict[tuple, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.source.file, unit.source.start)):
        size = batch_size(unit, recipe, most)
        kind = _kind(unit) if size > 1 else (unit.tensor,)
        batch = growing.setdefault(kind, [])
        batch.append(unit)
        if len(batch) >= size:
            full.append(growing.pop(kind))
    batches = [Batch.of(*batch) for batch in (*full, *growing.values())]
    left = [_less(batch, finished) for batch in batches]
    return [batch for batch in left if batch.todo]


def batch_size(unit: Unit, recipe: Recipe, most: int) -> int:
    """How many units like this one are converted together, where there are as many."""
    if most == 1 or not _may_batch(unit, recipe):
        return 1
    assert unit.matrix is not None
    return max(1, min(most, _BATCH_WEIGHTS // unit.matrix.weights))


def _may_batch(unit: Unit, recipe: Recipe) -> bool:
    """Whether it takes the course of `numerics.batched`: plain LoftQ with the fast step, all errors weighing alike."""
    matrix = unit.matrix
    if matrix is None or unit.target is None or matrix.weights > _SMALL_WEIGHTS:
        return False
    if recipe.method != "loftq" or recipe.plain or recipe.pooling > 1 or recipe.svd == "exact":
        return False
    weighted = recipe.calibrate is not None and unit.kind not in UNWEIGHTED
    return not weighted and may_stack(matrix.grid, *matrix.shape)


def _kind(unit: Unit) -> tuple:
    """Equal for units that may be in one batch."""
    assert unit.matrix is not None and unit.target is not None
    return unit.matrix.shape, unit.matrix.grid, unit.target.rank


def _less(batch: Batch, finished: Collection[str]) -> Batch:
    return Batch(batch.units, tuple(unit for unit in batch.units if unit.tensor not in finished))
