"""Names of parts of a tensor: what is made can be read back."""

from __future__ import annotations

import pytest

from loftq_cli.tensorfile.entry_names import (
    Entries,
    entries_name,
    entry_name,
    expert_name,
    parse_entries,
    share_name,
    whole_name,
)

STACK = "model.layers.1.mlp.experts.down_proj"


def test_what_is_made_is_read_back() -> None:
    assert entry_name(STACK, 3) == f"{STACK}[3]" and parse_entries(f"{STACK}[3]") == Entries(STACK, 3)
    assert entries_name(STACK, 8, 4) == f"{STACK}[8:12]" and parse_entries(f"{STACK}[8:12]") == Entries(STACK, 8, 12)
    assert whole_name(f"{STACK}[3]") == whole_name(f"{STACK}[8:12]") == STACK


@pytest.mark.parametrize("name", [STACK, f"{STACK}.weight", "", "x[a]", "x[1", "x[1].weight", "x[-1]"])
def test_a_whole_tensor_keeps_its_name(name: str) -> None:
    assert parse_entries(name) is None and whole_name(name) == name


def test_the_part_counts_where_a_parameter_joins_several() -> None:
    assert expert_name(STACK, 3, 0, 1) == f"{STACK}[3]"
    assert [expert_name(STACK, 3, part, 2) for part in (0, 1)] == [f"{STACK}[3].0", f"{STACK}[3].1"]
    assert share_name("x.lora_B.weight", 2, 0) == "x.lora_B.weight[2.0]"
