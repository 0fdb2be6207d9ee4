"""Widths and ranks under a budget: exact, against brute force."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from loftq_cli.budget.allocation import Choices, RankChoice, allocate, allocate_ranks


def random_items(generator: random.Random, count: int, options: int) -> list[Choices]:
    """Convex curves, and some that are not: costs need not fall with size."""
    items = []
    for _ in range(count):
        sizes = generator.sample(range(1, 60), options)
        items.append(Choices(tuple(sizes), tuple(generator.random() * 10 for _ in range(options))))
    return items


def brute_force(items: list[Choices], budget: int) -> float | None:
    best = None
    for taken in itertools.product(*(range(len(item.sizes)) for item in items)):
        if sum(item.sizes[c] for item, c in zip(items, taken)) <= budget:
            cost = sum(item.costs[c] for item, c in zip(items, taken))
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_widths_are_the_best_there_are(seed: int) -> None:
    generator = random.Random(seed)
    items = random_items(generator, generator.randint(1, 7), generator.randint(1, 4))
    least = sum(min(item.sizes) for item in items)
    for budget in (least - 1, least, least + generator.randint(0, 100), 10**6):
        found, best = allocate(items, budget), brute_force(items, budget)
        if best is None:
            assert found is None
            continue
        assert found is not None and found.size <= budget
        assert found.cost == pytest.approx(best, rel=1e-12)
        assert found.size == sum(item.sizes[c] for item, c in zip(items, found.taken))


def test_identical_matrices_and_ties() -> None:
    items = [Choices((2, 3, 4), (0.30, 0.04, 0.008))] * 6
    assert allocate(items, 15).cost == pytest.approx(brute_force(items, 15))
    assert allocate(items, 15) == allocate(items, 15)


def test_a_large_model_takes_no_time() -> None:
    """560 matrices of four awkward shapes: as many as Llama-2-70b has, with nothing in common for a table to use."""
    generator = random.Random(0)
    items = []
    for i in range(560):
        weights = (67_108_867, 8_388_617, 234_881_027, 51_200_003)[i % 4]
        error = 0.2 + 0.2 * generator.random()
        costs = tuple(weights * (error / factor) ** 2 for factor in (1, 2.7, 6.1, 80))
        items.append(Choices(tuple(weights * bits for bits in (2, 3, 4, 8)), costs))
    total = sum(item.sizes[0] for item in items) // 2
    started = time.perf_counter()
    found = allocate(items, int(2.5 * total))
    assert time.perf_counter() - started < 5
    assert found is not None and 0 <= 2.5 - found.size / total < 1e-4


def test_ranks_go_where_singular_values_are() -> None:
    steep = RankChoice((9.0, 4.0, 1.0, 0.1), 10)
    flat = RankChoice((0.5, 0.4, 0.3, 0.2), 10)
    assert allocate_ranks([steep, flat], 40) == (3, 1)
    assert allocate_ranks([steep, flat], 60) == (3, 3)
    assert allocate_ranks([steep, flat], 10**6) == (4, 4)
    assert allocate_ranks([steep, flat], 0) == (1, 1), "an adapter has at least one rank"
    assert allocate_ranks([steep, RankChoice((9.0, 4.0), 100)], 130) == (3, 1), "by gain a parameter"
