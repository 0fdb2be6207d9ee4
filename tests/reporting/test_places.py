"""Layers and modules, as the names of modules tell them."""

from __future__ import annotations

import pytest

from loftq_cli.reporting.heatmap import column_labels, level_of
from loftq_cli.reporting.places import Place, find_places


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (["model.layers.{}.mlp.up_proj"], Place("model.layers", 3, "mlp.up_proj")),
        (["encoder.block.{}.layer.1.wi"], Place("encoder.block", 3, "layer.1.wi")),
        (["stages.1.blocks.{}.attn.q"], Place("stages.1.blocks", 3, "attn.q")),
        (["h.{}.experts.7.w1"], Place("h", 3, "experts.*.w1")),
        (["{}.proj"], Place("", 3, "proj")),
    ],
)
def test_the_layer_is_the_number_with_the_most_values(names: list[str], place: Place) -> None:
    many = [name.format(number) for name in names for number in range(5)]
    many += [name.format(2).replace("experts.7", f"experts.{expert}") for name in names for expert in range(99)]
    assert find_places(many)[names[0].format(3)] == place


def test_modules_outside_of_layers() -> None:
    assert find_places(["lm_head", ""]) == {"lm_head": Place("", None, "lm_head"), "": Place("", None, "")}


def test_labels_are_as_short_as_they_can_be() -> None:
    modules = ["attn.q_proj", "mlp.shared.up", "mlp.experts.up", "up", "a.down", "down"]
    assert column_labels(modules) == ("q_proj", "shared.up", "experts.up", "up", "a.down", "down")
    assert len(column_labels(["x" * 500])[0]) == 18


def test_colours_cover_the_range() -> None:
    assert [level_of(value, 0.0, 1.0) for value in (-1.0, 0.0, 0.05, 0.95, 1.0, 7.0)] == [0, 0, 0, 9, 9, 9]
    assert level_of(0.0, 0.0, 0.0) == 5
