"""Reasons: data that is rendered last."""

from __future__ import annotations

import string

import pytest

from loftq_cli.modules.reasons import Reason, Why


@pytest.mark.parametrize("why", Why)
def test_every_reason_can_be_rendered(why: Why) -> None:
    fields = {field for _, field, _, _ in string.Formatter().parse(why.value) if field}
    assert fields <= {"name", "found"}
    text = str(Reason(why, name="N{0}N", found="F}F"))
    assert text and ("name" in fields) == ("N{0}N" in text) and ("found" in fields) == ("F}F" in text)


def test_the_texts_that_manifests_hold() -> None:
    assert str(Reason(Why.TIED, "lm_head.weight")) == "tied to lm_head.weight"
    assert str(Reason(Why.RULE_SKIP, r"layers\.1\..*k_proj")) == r"rule 'layers\.1\..*k_proj=skip'"
    assert str(Reason(Why.OTHER_TOWER, "vision")) == "vision tower (choose it with --include)"
    assert str(Reason(Why.BESIDE_NONFINITE, "x[2]", "nan at [0, 1]")) == "stacked with x[2], which holds nan at [0, 1]"
    assert str(Reason(Why.REFUSED, found="bnb cannot hold experts")) == "bnb cannot hold experts"
