"""The adapter's config: PEFT finds exactly the chosen modules and each one's rank, in time linear in their number."""

from __future__ import annotations

import pytest

from loftq_cli.formats import adapter
from loftq_cli.formats.adapter import AdapterTarget, adapter_config

SCHEME = {"scaling": 2.0, "task_type": None, "base_model": "x", "fan_in_fan_out": False, "fingerprint": "f"}


def config(ranks: dict[str, int], modules: list[str]) -> dict:
    targets = [AdapterTarget(name, "linear", 64, 64, rank) for name, rank in ranks.items()]
    return adapter_config(targets, modules, **SCHEME)


@pytest.mark.parametrize("order", [1, -1])
def test_each_module_gets_its_own_rank_though_paths_end_alike(order: int) -> None:
    """A base class has `layers.0.fc` beside `vision.layers.0.fc`, and PEFT takes the first key that ends the path."""
    from peft.utils.other import get_pattern_key

    ranks = {"layers.0.fc": 4, "layers.1.fc": 8, "vision.layers.0.fc": 8, "a.vision.layers.0.fc": 2, "b.fc": 8}
    found = config(dict(list(ranks.items())[::order]), list(ranks))
    for name, rank in ranks.items():
        key = get_pattern_key(found["rank_pattern"].keys(), name)
        assert found["rank_pattern"].get(key, found["r"]) == rank, name
        assert found["alpha_pattern"].get(key, found["lora_alpha"]) == 2 * rank, name


def test_ranks_are_listed_as_before_where_no_path_ends_like_another() -> None:
    ranks = {"model.layers.1.fc": 4, "model.layers.0.fc": 8, "model.layers.2.fc": 8}
    assert list(config(ranks, list(ranks))["rank_pattern"].items()) == [("model.layers.1.fc", 4)]


def test_a_module_of_any_kind_that_ends_like_a_chosen_one_is_not_adapted() -> None:
    import re

    chosen = {"layers.0.fc": 8, "layers.1.fc": 8}
    assert config(chosen, [*chosen, "vision.layers.10.fc"])["target_modules"] == list(chosen)
    pattern = config(chosen, [*chosen, "vision", "vision.layers.0.fc"])["target_modules"]
    assert [name for name in ("layers.0.fc", "layers.1.fc", "vision.layers.0.fc") if re.fullmatch(pattern, name)] == [
        *chosen
    ]


def test_comparisons_grow_with_the_number_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module is looked up once in each list, however many there are."""
    calls = []
    real = adapter._ends_like
    monkeypatch.setattr(adapter, "_ends_like", lambda name, paths: calls.append(name) or real(name, paths))
    for count in (100, 200):
        calls.clear()
        names = [f"model.layers.{number}.fc" for number in range(count)]
        config(dict.fromkeys(names[::2], 8), names)
        assert len(calls) == count
