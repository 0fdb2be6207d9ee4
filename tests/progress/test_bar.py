"""Progress for Python: `quantize(progress=True)` shows one bar that ends full, and the manifest shows itself."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tqdm.auto

import loftq_cli
from loftq_cli.errors import UsageError
from loftq_cli.machine.sizes import size_text
from loftq_cli.progress import Reporter
from loftq_cli.progress.bar import BarReporter

RECIPE: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 1, "device": "cpu"}


class Bar(tqdm.tqdm):
    """A bar that keeps what it showed."""

    made: list[Bar]
    postfixes: list[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, file=io.StringIO(), mininterval=0, **options)
        Bar.made.append(self)
        self.postfixes, self.was_closed = [], False

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self.postfixes.append(s)
        super().set_postfix_str(s, refresh)

    def close(self) -> None:
        self.was_closed = True
        super().close()


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    return Bar.made


def test_one_bar_in_bytes_ends_full_with_the_residuals_of_the_manifest(
    random_llama: Path, tmp_path: Path, bars: list[Bar]
) -> None:
    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", progress=True, **RECIPE)
    (bar,) = bars
    assert bar.n == bar.total > 0 and bar.unit == "B" and bar.was_closed and bar.desc == "converting"
    totals = manifest.totals
    means = f"residual {totals.plain_residual:.4f} → {totals.residual:.4f}"
    assert any(text.startswith(f"{means}, ") for text in bar.postfixes)
    assert {record.module for record in manifest.matrices} <= {text.split(", ")[-1] for text in bar.postfixes}


def test_nothing_is_shown_without_it(random_llama: Path, tmp_path: Path, bars: list[Bar], capsys: Any) -> None:
    capsys.readouterr()
    loftq_cli.quantize(random_llama, output=tmp_path / "out", **RECIPE)
    shown = capsys.readouterr()
    assert bars == [] and (shown.out, shown.err) == ("", "")


def test_a_resumed_conversion_starts_where_it_was(random_llama: Path, tmp_path: Path, bars: list[Bar]) -> None:
    class Stop(BarReporter):
        def done(self, *args: Any) -> None:
            super().done(*args)
            if self._matrices == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loftq_cli.quantize(random_llama, output=tmp_path / "out", reporter=Stop(), **RECIPE)
    loftq_cli.quantize(random_llama, output=tmp_path / "out", progress=True, **RECIPE)
    first, second = bars
    assert first.was_closed and 0 < first.n < first.total and second.n == second.total and second.initial > 0


def test_measuring_has_a_bar_of_its_own(bars: list[Bar]) -> None:
    reporter = BarReporter()
    for done in range(4):
        reporter.measuring(done, 4)
    reporter.comparing(0, 2)
    reporter.finishing("hashing\x1b[2J files")
    reporter.close()
    reporter.close()
    assert [(bar.n, bar.total, bar.was_closed) for bar in bars] == [(4, 4, True), (1, 2, True)]
    assert bars[1].postfixes == ["hashing\\x1b[2J files"]


def test_notes_are_printable_lines_on_stderr(capsys: Any) -> None:
    BarReporter().note("a\x1b[2Jb")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "a\\x1b[2Jb\n")


def test_a_bar_and_a_reporter_exclude_each_other(random_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^progress=True shows a bar of its own: leave it out, or leave out reporter"):
        loftq_cli.quantize(random_llama, output=tmp_path / "out", progress=True, reporter=Reporter(), **RECIPE)
    assert not (tmp_path / "out").exists()


def test_progress_does_not_need_the_command_line() -> None:
    program = "import sys, loftq_cli.progress.bar; print({'typer', 'loftq_cli.cli'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr


def test_the_manifest_is_a_table_in_a_notebook(random_llama: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", **RECIPE)
    table = ElementTree.fromstring(manifest._repr_html_())
    rows = {row[0].text: row[1].text for row in table.iter("tr")}
    totals = manifest.totals
    assert rows["weights"] == f"{size_text(totals.source_bytes)} → {size_text(totals.backbone_bytes)}"
    assert rows["mean residual"] == f"{totals.residual:.4f} with the adapter, {totals.plain_residual:.4f} plain"
    assert len(rows) == 9 and table.find("caption").text == str(tmp_path / "out")  # type: ignore[union-attr]


def test_names_cannot_break_out_of_the_table(random_llama: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", **RECIPE)
    odd = "</td><script>alert(1)</script>\"'&\u202e\x1b"
    shown = dataclasses.replace(manifest, output=odd, source=odd, architecture=odd, device=odd)._repr_html_()
    assert "<script" not in shown and "\u202e" not in shown and "\x1b" not in shown
    assert set(re.findall(r"</?(\w+)", shown)) == {"table", "caption", "tbody", "tr", "th", "td"}
    ElementTree.fromstring(shown)
