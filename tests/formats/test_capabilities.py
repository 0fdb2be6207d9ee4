"""The table of containers: complete, current in the docs, and every claim backed."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from support.paths import ROOT

from loftq_cli.formats import FORMATS, get_format
from loftq_cli.formats.base import GridRequest, Refusal
from loftq_cli.formats.capabilities import markdown_table
from loftq_cli.formats.container import UPSTREAM, Container
from loftq_cli.recipe.model import BITS, FORMAT_NAMES


def test_every_container_can_be_chosen_and_opened() -> None:
    assert [get_format(name).name for name in FORMATS] == list(FORMATS)
    assert [item.name for item in FORMATS.values()] == list(FORMATS)
    assert sorted(FORMAT_NAMES) == sorted(["auto", *FORMATS])


@pytest.mark.parametrize("item", FORMATS.values(), ids=FORMATS)
def test_bits_are_those_the_container_takes(item: Container) -> None:
    data_type, block = ("int", 32) if item.integers_only else ("nf", 64)

    def takes(bits: int) -> bool:
        request = GridRequest("linear", 64, 128, bits, data_type, block, torch.float32, module="model.layers.0.fc")
        return not isinstance(get_format(item.name).grid(request), Refusal)

    assert tuple(bits for bits in BITS if takes(bits)) == item.capability.bits


@pytest.mark.parametrize("item", FORMATS.values(), ids=FORMATS)
def test_claims_name_tests_that_exist(item: Container) -> None:
    row = item.capability
    for claim in (row.exact, row.trains, row.serves):
        if claim.proof == UPSTREAM:
            continue
        file, _, name = claim.proof.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), claim.proof
    assert row.exact.proof != UPSTREAM and row.trains.proof != UPSTREAM


def test_the_docs_show_the_current_table() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert "\n<!-- generated: formats -->\n" in page and script.containers() == markdown_table()
