"""Group units into stacks that are converted together: small matrices of equal shape, for which a GPU spends more time
on kernel launches than on computing.

Sums over a stack may differ in the last bits from those over a single matrix. Therefore stacks depend on the plan
alone, and a stack is always computed as a whole: a resumed run produces the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from loftq_cli.numerics.methods.stacked import may_stack
from loftq_cli.planning.units import UNWEIGHTED, Unit
from loftq_cli.recipe.model import Recipe

MOST_STACKED = 32  # at this number of matrices per launch, the cost of a launch is negligible
_SMALL_WEIGHTS = 1 << 23  # above this, a product takes a GPU longer than its launch
_STACK_WEIGHTS = 1 << 26  # of all its matrices: about 2 GB of device memory, little for a GPU that holds an LLM


@dataclass(frozen=True)
class Stack:
    """Units that are read and converted together; often a single one.

    Attributes:
        todo: those whose outputs are written; an earlier run has finished the others.
    """

    units: tuple[Unit, ...]
    todo: tuple[Unit, ...]

    @staticmethod
    def of(*units: Unit) -> Stack:
        """Return a stack with no finished units."""
        return Stack(units, units)


def form_stacks(
    units: Iterable[Unit], recipe: Recipe, most: int, finished: Collection[str] = frozenset()
) -> list[Stack]:
    """Group all units of a plan into stacks of at most `most`, in the order of the source's files.

    Stacks whose units are all `finished` (tensor names) are left out.
    """
    full: list[list[Unit]] = []
    growing: dict[tuple, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.source.file, unit.source.start)):
        size = stack_size(unit, recipe, most)
        kind = _kind(unit) if size > 1 else (unit.tensor,)
        stack = growing.setdefault(kind, [])
        stack.append(unit)
        if len(stack) >= size:
            full.append(growing.pop(kind))
    stacks = [Stack.of(*stack) for stack in (*full, *growing.values())]
    left = [_less(stack, finished) for stack in stacks]
    return [stack for stack in left if stack.todo]


def can_stack(units: Sequence[Unit], recipe: Recipe) -> bool:
    """True if these units can be a stack: a single one, or several that `numerics.methods.stacked` takes together."""
    if len(units) == 1:
        return True
    return all(_is_stackable(unit, recipe) for unit in units) and len({_kind(unit) for unit in units}) == 1


def stack_size(unit: Unit, recipe: Recipe, most: int) -> int:
    """Return the maximum number of units like this one that are converted together."""
    if most == 1 or not _is_stackable(unit, recipe):
        return 1
    assert unit.matrix is not None
    return max(1, min(most, _STACK_WEIGHTS // unit.matrix.weights))


def _is_stackable(unit: Unit, recipe: Recipe) -> bool:
    """True if `numerics.methods.stacked` applies: plain LoftQ with the fast step and unweighted errors."""
    matrix = unit.matrix
    if matrix is None or unit.target is None or matrix.weights > _SMALL_WEIGHTS:
        return False
    if recipe.method != "loftq" or recipe.plain or recipe.pooling > 1 or recipe.svd == "exact":
        return False
    weighted = recipe.calibrate is not None and unit.kind not in UNWEIGHTED
    return not weighted and may_stack(matrix.grid, *matrix.shape)


def _kind(unit: Unit) -> tuple:
    """Return a key that is equal for units that may share a stack."""
    assert unit.matrix is not None and unit.target is not None
    return unit.matrix.shape, unit.matrix.grid, unit.target.rank


def _less(stack: Stack, finished: Collection[str]) -> Stack:
    return Stack(stack.units, tuple(unit for unit in stack.units if unit.tensor not in finished))
