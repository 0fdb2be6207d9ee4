"""A standard output that cannot be written to ends in one sentence, whatever was to be printed there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loftq_cli

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def run(*words: object) -> tuple[int, list[str]]:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "loftq_cli", *map(str, words)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("loftq: ")]


@pytest.mark.parametrize("words", [("schema",), ("--version",)], ids=" ".join)
def test_results_that_cannot_be_written_end_in_a_sentence(words: tuple[str, ...]) -> None:
    code, lines = run(*words)
    assert code == 1 and len(lines) == 1 and "No space left on device" in lines[0]
    assert "unexpected" not in lines[0] and "make room there" in lines[0]


def test_a_failed_verification_keeps_its_exit_code(random_llama: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=4, rank=2, iters=1, include=("*.layers.0.*",))
    settings = tmp_path / "out" / "generation_config.json"
    settings.write_text(json.dumps({"changed": True}))
    code, lines = run("verify", tmp_path / "out")
    assert code == 3 and len(lines) == 2 and "1 difference" in lines[0] and "No space left on device" in lines[1]
