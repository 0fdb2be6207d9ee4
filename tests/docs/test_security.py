"""SECURITY.md: every guarantee names tests, and every test that it names exists."""

from __future__ import annotations

import re

from support.paths import ROOT

KINDS = 16  # of faults that have been found by reviewers and users
_TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows() -> list[list[str]]:
    """Return the cells of the table of guarantees."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    _, found, rest = text.partition("| kind | guarantee | tests |\n|---|---|---|\n")
    assert found, "the table is gone"
    return [line.strip("|").split("|") for line in rest.partition("\n\n")[0].splitlines()]


def test_every_guarantee_names_tests_that_exist() -> None:
    assert len(rows()) >= KINDS
    for kind, guarantee, tests in rows():
        named = _TEST.findall(tests)
        assert guarantee.strip().endswith(".") and named, kind
        assert len(named) == tests.count("`") / 2, f"{kind}: something that is no test"
        for file, name in named:
            path = ROOT / "tests" / file
            assert path.is_file(), file
            assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{name}"
