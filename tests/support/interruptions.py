"""Conversions that are stopped half-way, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest

import loftq_cli
from loftq_cli.progress import Reporter

RECIPE = {"bits": 2, "rank": 4, "iters": 2, "max_shard_size": "40KB"}


def tensors(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.safetensors")}


class StopAfter(Reporter):
    """Stop the run after some units, as a crash would."""

    def __init__(self, units: int) -> None:
        self.left = units

    def done(self, unit, record) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("stopped by the test")


def stop_after(units: int, source: Path, output: Path, **recipe: object) -> None:
    with pytest.raises(RuntimeError, match="stopped by the test"):
        loftq_cli.quantize(source, output=output, reporter=StopAfter(units), **{**RECIPE, **recipe})
