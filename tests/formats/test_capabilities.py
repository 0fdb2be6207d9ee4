"""The table of containers: complete, current in the docs, and every claim backed."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from support.paths import ROOT

from loftq_cli.formats import FORMATS, get_format
from loftq_cli.formats.base import GridRequest, Refusal
from loftq_cli.formats.capabilities import CAPABILITIES, UPSTREAM, Capability, markdown_table
from loftq_cli.planning.resolve import INTEGER_FORMATS
from loftq_cli.recipe.model import BITS, FORMAT_NAMES


def test_every_container_has_an_entry() -> None:
    assert [item.format for item in CAPABILITIES] == list(FORMATS)
    assert sorted(FORMAT_NAMES) == sorted(["auto", *FORMATS])


@pytest.mark.parametrize("item", CAPABILITIES, ids=lambda item: item.format)
def test_bits_are_those_the_container_takes(item: Capability) -> None:
    data_type, block = ("int", 32) if item.format in INTEGER_FORMATS else ("nf", 64)

    def takes(bits: int) -> bool:
        request = GridRequest("linear", 64, 128, bits, data_type, block, torch.float32, module="model.layers.0.fc")
        return not isinstance(get_format(item.format).grid(request), Refusal)

    assert tuple(bits for bits in BITS if takes(bits)) == item.bits


@pytest.mark.parametrize("item", CAPABILITIES, ids=lambda item: item.format)
def test_claims_name_tests_that_exist(item: Capability) -> None:
    for claim in (item.exact, item.trains, item.serves):
        if claim.proof == UPSTREAM:
            continue
        file, _, name = claim.proof.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), claim.proof
    assert item.exact.proof != UPSTREAM and item.trains.proof != UPSTREAM


def test_the_docs_show_the_current_table() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert "\n<!-- generated: formats -->\n" in page and script.containers() == markdown_table()
