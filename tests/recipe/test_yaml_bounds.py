"""YAML recipes that are read from pipes, and aliases that stand for more than memory holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loftq_cli.errors import UsageError
from loftq_cli.recipe.suggestions import suggestion
from loftq_cli.recipe.yaml_file import place_of, read_places, read_yaml


def bomb(levels: int, join: str) -> str:
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {join.format(', '.join([f'*a{level - 1}'] * 9))}")
    return "\n".join([*lines, f"output: *a{levels - 1}", ""])


@pytest.mark.parametrize("join", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merged mappings"])
def test_aliases_that_multiply_are_refused(join: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(bomb(30, join))
    with pytest.raises(UsageError, match="too long or nested too deeply"):
        read_places(path)


@pytest.mark.parametrize("text", ["bits: &a [*a]\n", "bits: &a {b: *a}\n"])
def test_an_alias_of_what_it_is_in_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="too long or nested too deeply"):
        read_yaml(path)


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("exclude: &names [a, b]\ninclude: *names\n")
    assert read_yaml(path) == {"exclude": ["a", "b"], "include": ["a", "b"]}


def test_a_pipe_of_the_shell_is_read_once_for_all_readers(tmp_path: Path) -> None:
    """`--config <(...)`: the places and the recipe are read from the same file."""
    for name in ("first", "second"):
        reading, writing = os.pipe()
        try:
            os.write(writing, f"bits: 2\noutput: {name}\n".encode())
            os.close(writing)
            path = Path(f"/dev/fd/{reading}")
            assert read_places(path) == {"output": name}
            assert read_yaml(path) == {"bits": 2, "output": name}
            assert place_of(path, "output") == f"{path}, line 2"
        finally:
            os.close(reading)


def test_digits_of_other_scripts_are_not_suggested() -> None:
    assert suggestion("rank", (int,), (), "٣") == "" and suggestion("rank", (int,), (), "3") == "3 without quotes"
