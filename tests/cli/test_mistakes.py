"""The commonest mistakes at the command line, and the sentence that each of them gets: see mistakes.txt."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import runner

from loftq_cli.cli import app

CASES = Path(__file__).with_name("mistakes.txt")


@dataclass(frozen=True)
class Case:
    """A command, the recipe file that it reads if any, and what it prints."""

    command: str
    recipe: str
    expected: str


def _cases() -> list[Case]:
    found = []
    for block in CASES.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines:
            recipe = "\n".join(line.removeprefix("recipe.yaml> ") for line in lines if line.startswith("recipe.yaml> "))
            (command,) = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            found.append(Case(command, recipe, lines[-1]))
    return found


def _model(folder: Path, source: Path) -> None:
    """Put a model, an unfinished folder and somebody's files where the commands expect them."""
    (folder / "model").symlink_to(source)
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("mine")
    (folder / "adapter").mkdir()
    values = {"peft_type": "LORA", "base_model_name_or_path": "some-org/base", "r": 8}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")


def test_there_are_25_and_each_is_one_sentence() -> None:
    cases = _cases()
    assert len(cases) >= 25
    for case in cases:
        assert case.expected.startswith("loftq: ") and case.expected[-1] in ".?", case
        assert len(case.expected) < 260, case


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.command[:60])
def test_a_mistake_gets_its_sentence(
    case: Case, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model(tmp_path, random_llama)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if case.recipe:
        Path("recipe.yaml").write_text(case.recipe + "\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = runner.invoke(app, shlex.split(case.command)[1:], prog_name="loftq")
    assert result.exit_code in (1, 2) and result.stdout == ""
    said = result.stderr.replace(str(tmp_path), ".").replace(str(random_llama), "model")
    assert said.strip().splitlines()[-1] == case.expected
    assert sorted(path.name for path in tmp_path.iterdir()) == before
