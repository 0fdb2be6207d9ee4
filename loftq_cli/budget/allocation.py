"""Allocate bits and ranks to matrices under one budget. Pure arithmetic on measured errors.

Widths: a multiple-choice knapsack, minimise Σ cost[i, c(i)] subject to Σ size[i, c(i)] ≤ budget, solved exactly. The
Lagrangian relaxation (Everett 1963) yields a feasible start and a lower bound for the undecided items; dynamic
programming over Pareto-optimal partial sums keeps only those whose bound beats the best known answer (the scheme of
Dyer, Riha and Walker 1995). Ranks: each further singular value is worth its square, so taking the best value per
parameter first is optimal up to the last one taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_ROUNDING = 1e-12  # relative: a bound this close to the best known cost may still be as good


@dataclass(frozen=True)
class Choices:
    """One matrix's options: `sizes` (whole units of the budget) and `costs`, one entry for each option."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Allocation:
    """The option chosen for every item, with total size and cost."""

    taken: tuple[int, ...]
    size: int
    cost: float


@dataclass(frozen=True)
class _Step:
    """The step from one option on an item's lower convex hull to the next."""

    item: int
    option: int
    size: int
    gain: float

    @property
    def slope(self) -> float:
        return self.gain / self.size


def allocate(items: Sequence[Choices], budget: int) -> Allocation | None:
    """Choose one option per item at the least cost with sizes that sum to at most `budget`; None if nothing fits.

    The result is exact. Ties are broken by order, so that the same numbers always give the same answer.
    """
    smallest = [_hull(item)[0] for item in items]
    if sum(item.sizes[option] for item, option in zip(items, smallest)) > budget:
        return None
    start, price = _relaxed(items, budget)
    best = _sum(items, start)
    return _search(items, budget, best, price)


def _search(items: Sequence[Choices], budget: int, best: Allocation, price: float) -> Allocation:
    """Search the partial sums whose Lagrangian bound at `price` allows a better answer than `best`."""
    relaxed = [np.array(item.costs) + price * np.array(item.sizes, dtype=float) for item in items]
    least = np.array([float(values.min()) for values in relaxed])
    regret = [float(np.partition(values, 1)[1] - values.min()) if len(values) > 1 else np.inf for values in relaxed]
    # Clear cases first: their other options are ruled out at once, so that few sums are left for the close cases.
    order = sorted(range(len(items)), key=lambda i: -regret[i])
    rest = float(least.sum()) - price * budget
    rest_size = sum(min(item.sizes) for item in items)
    sizes, costs = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for i in order:
        item = items[i]
        rest, rest_size = rest - float(least[i]), rest_size - min(item.sizes)
        count = len(item.sizes)
        new_sizes = (sizes[:, None] + np.array(item.sizes, dtype=np.int64)).reshape(-1)
        new_costs = (costs[:, None] + np.array(item.costs)).reshape(-1)
        limit = best.cost * (1 + _ROUNDING)
        alive = np.flatnonzero((new_sizes + rest_size <= budget) & (new_costs + price * new_sizes + rest <= limit))
        alive = alive[_pareto(new_sizes[alive], new_costs[alive])]
        trail.append((alive // count, alive % count))
        sizes, costs = new_sizes[alive], new_costs[alive]
        if not len(alive):
            return best
    found = _sum(items, _walk_back(trail, order, int(costs.argmin())))
    return found if found.cost < best.cost else best


def _pareto(sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Return the positions of sums that no other sum beats in both size and cost, ordered by size."""
    order = np.lexsort((costs, sizes))
    lowest = np.minimum.accumulate(costs[order])
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = costs[order][1:] < lowest[:-1]
    return order[keep]


def _walk_back(trail: list[tuple[np.ndarray, np.ndarray]], order: list[int], at: int) -> list[int]:
    taken = [0] * len(order)
    for i, (parents, options) in zip(reversed(order), reversed(trail)):
        taken[i] = int(options[at])
        at = int(parents[at])
    return taken


def _relaxed(items: Sequence[Choices], budget: int) -> tuple[list[int], float]:
    """Return a feasible answer, taking the steepest steps first, and the price per unit of size at which the budget is
    exhausted."""
    hulls = [_hull(item) for item in items]
    taken = [hull[0] for hull in hulls]
    size = sum(item.sizes[option] for item, option in zip(items, taken))
    steps = sorted(
        (step for i, hull in enumerate(hulls) for step in _steps(i, items[i], hull)), key=lambda step: -step.slope
    )
    price, stuck = 0.0, set()
    for step in steps:
        if step.item in stuck:
            continue
        if size + step.size > budget:
            price = price or step.slope
            stuck.add(step.item)  # later steps of the hull start from this one
            continue
        size, taken[step.item] = size + step.size, step.option
    return taken, price


def _hull(item: Choices) -> list[int]:
    """Return the options on the lower convex hull of cost over size, smallest first; costs fall strictly along it."""
    hull: list[int] = []
    for option in sorted(range(len(item.sizes)), key=lambda c: (item.sizes[c], item.costs[c])):
        if hull and item.costs[option] >= item.costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(item, hull[-2], option) >= _slope(item, hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(item: Choices, a: int, b: int) -> float:
    """Return the cost saved per unit of size between option `a` and the larger option `b`."""
    return (item.costs[a] - item.costs[b]) / (item.sizes[b] - item.sizes[a])


def _steps(i: int, item: Choices, hull: list[int]) -> list[_Step]:
    sizes, costs = item.sizes, item.costs
    return [_Step(i, b, sizes[b] - sizes[a], costs[a] - costs[b]) for a, b in pairwise(hull)]


def _sum(items: Sequence[Choices], taken: Sequence[int]) -> Allocation:
    size = sum(item.sizes[option] for item, option in zip(items, taken))
    return Allocation(tuple(taken), size, sum(item.costs[option] for item, option in zip(items, taken)))


@dataclass(frozen=True)
class RankChoice:
    """One matrix's adapter: the gain of each further rank (descending) and its number of parameters."""

    gains: tuple[float, ...]
    size: int


def allocate_ranks(items: Sequence[RankChoice], budget: int) -> tuple[int, ...]:
    """Return ranks of at least 1 with parameters that sum to at most `budget`, unless the first ranks alone exceed it.

    The best gain per parameter comes first.

    Args:
        budget: number of parameters of all adapters together.
    """
    ranks = [1] * len(items)
    left = budget - sum(item.size for item in items)
    queue = [(-item.gains[1] / item.size, i) for i, item in enumerate(items) if len(item.gains) > 1]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        item = items[i]
        if item.size > left:
            continue
        left -= item.size
        ranks[i] += 1
        if ranks[i] < len(item.gains):
            heapq.heappush(queue, (-item.gains[ranks[i]] / item.size, i))
    return tuple(ranks)
