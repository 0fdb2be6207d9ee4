"""Progress in a terminal and in a log, at 80 columns."""

from __future__ import annotations

import io
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import loftq_cli
from loftq_cli.cli.progress import LineReporter, LiveReporter

RECIPE = {"bits": 2, "rank": 4, "iters": 1, "device": "cpu"}


def convert(source: Path, out: Path, reporter: object) -> None:
    loftq_cli.quantize(source, output=out, reporter=reporter, **RECIPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_display_fits(width: int, random_llama: Path, tmp_path: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, legacy_windows=False, color_system=None)
    reporter = LiveReporter(console)
    convert(random_llama, tmp_path / "out", reporter)
    reporter._module = "model.language_model.layers.61.mlp.shared_experts.gate_up_proj" * 2
    reporter.done_bytes, reporter.total, reporter.matrices = 25_900_000_000, 26_000_000_000, 5_000
    reporter.started = time.monotonic() - 3_000
    shown = Console(file=io.StringIO(), width=width)
    reporter._bar.update(reporter._task, total=reporter.total, completed=reporter.done_bytes, **reporter._fields())
    for renderable in reporter._bar.get_renderables():
        shown.print(renderable)
    first, second = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(first.rstrip()) <= width and "25.9 GB of 26 GB, 8.63 MB/s, 11.6 s left" in first, first
    assert len(second) <= width and second.startswith("residual 0.") and "…" in second


def test_a_line_of_a_log_fits(random_llama: Path, tmp_path: Path) -> None:
    reporter = LineReporter(Console(file=io.StringIO(), width=80), verbose=False)
    convert(random_llama, tmp_path / "out", reporter)
    reporter.done_bytes, reporter.total, reporter.matrices = 25_900_000_000, 26_000_000_000, 5_000
    reporter.started = time.monotonic() - 30_000
    line = reporter._line("model.language_model.layers.61.mlp.shared_experts.gate_up_proj")
    assert len(line) <= 80 and " left, mean residual 0." in line and line.endswith("_proj"), line


@pytest.mark.parametrize("step", [6.0, 12.0])
def test_a_log_gets_a_line_every_five_seconds_and_later_every_thirty(step: float) -> None:
    file, clock = io.StringIO(), SimpleNamespace(now=0.0)
    reporter = LineReporter(Console(file=file, width=80), verbose=False)
    reporter.matrices, reporter.total = 100, 100
    reporter.started = reporter._last = clock.now
    record = SimpleNamespace(module="m", shape=(1, 1), bits=2, plain_residual=0.5, residual=0.4, tensor="m")
    unit = SimpleNamespace(source=SimpleNamespace(nbytes=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loftq_cli.cli.progress.time.monotonic", lambda: clock.now)
        said = []
        for _ in range(40):
            clock.now += step
            before = file.tell()
            reporter.done(unit, record)  # type: ignore[arg-type]
            if file.tell() > before:
                said.append(clock.now)
    early, late = [t for t in said if t < 60], [t for t in said if t >= 60]
    assert early == [step * i for i in range(1, len(early) + 1)] and len(early) >= 4
    assert all(b - a >= 30 for a, b in itertools.pairwise(late))


def test_no_time_left_is_guessed_from_the_first_seconds() -> None:
    reporter = LineReporter(Console(file=io.StringIO()), verbose=False)
    reporter.total, reporter.done_bytes = 100, 1
    assert reporter.left() == "…"
    reporter.started -= 10
    assert "min" in reporter.left()
