"""Regular expressions from users and files take bounded time."""

from __future__ import annotations

import re
import time
from fnmatch import fnmatchcase

import pytest

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine import patterns
from loftq_cli.machine.patterns import BoundedPattern, bounded_pattern
from loftq_cli.recipe.rules import parse_rule

NAME = "model.layers.10.mlp.experts.3.down_proj"
CHEAP = (r"layers\.\d+\.", "q_proj|down_proj", r"^model\.layers\.10\b", r"layers\.(10|11)\.", ".*mlp.*", "(?i)MLP")
RISKY = ("(a+)+$", "(a|a)*b", ".*.*.*.*.*=", "(x?){30}y", r"(a)(.*)\1", r"(m|o)+(\.|d)*e.*l.*s")


@pytest.mark.parametrize("text", CHEAP + RISKY)
def test_searches_find_what_re_finds(text: str) -> None:
    for name in (NAME, "aaa", "lm_head", "aab", ""):
        assert bounded_pattern(text).search(name) == bool(re.search(text, name))


def test_only_expressions_that_can_run_away_get_a_time_limit() -> None:
    assert all(BoundedPattern(text)._cheap for text in CHEAP)
    assert not any(BoundedPattern(text)._cheap for text in RISKY)


@pytest.mark.parametrize("text", ["(", "a{99999999999999999999}", "(" * 5_000 + ")" * 5_000, "x" * 10_001])
def test_invalid_expressions_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        bounded_pattern(text)
    with pytest.raises(UsageError, match="invalid regular expression") as caught:
        parse_rule(f"{text}=4")
    assert len(str(caught.value)) < 500


def test_a_search_that_runs_away_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)
    pattern, started = BoundedPattern("(a|aa)+$"), time.monotonic()
    for _ in range(2):
        with pytest.raises(LoftqError, match="takes too long on"):
            pattern.search("a" * 200 + "b")
    assert time.monotonic() - started < 30


def test_globs_do_not_backtrack() -> None:
    started = time.monotonic()
    assert not fnmatchcase("a" * 300 + "c", "*a" * 200 + "b")
    assert time.monotonic() - started < 2
