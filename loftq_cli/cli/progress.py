"""Progress of a conversion: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.cli.terminal import duration, messages, warn
from loftq_cli.machine.sizes import size_text
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter

_LINE_EVERY, _LATER_EVERY, _FIRST = 5.0, 30.0, 60.0  # seconds between plain lines, during the first minute and after
_SURE_AFTER = 5.0  # seconds of work before the time left is shown: kernels compile in the first ones
_BESIDE_BAR = 56  # columns for everything on the first line but the bar
_SHORTEST_BAR, _LONGEST_BAR = 8, 24


def choose_reporter(*, silent: bool, verbose: bool) -> Reporter:
    """Return a silent, live or plain reporter, depending on the flags and the terminal."""
    if silent:
        return Reporter()
    console = messages()
    return LiveReporter(console) if console.is_terminal and not verbose else LineReporter(console, verbose)


class _Counting(Reporter):
    """Keeps the counts for both displays; work is measured in bytes of the matrices to quantize."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.records: list[MatrixRecord] = []
        self.total = self.done_bytes = self.matrices = 0
        self._before = 0  # bytes from an earlier run, which do not count for the rate of this one
        self.started = time.monotonic()
        self._said = float("-inf")

    def measuring(self, done: int, total: int) -> None:
        self._say_sometimes(f"measuring matrix {done + 1} of {total} for the budget")

    def comparing(self, done: int, total: int) -> None:
        self._say_sometimes(f"comparing tensor {done + 1} of {total} with the source, whose files look changed")

    def _say_sometimes(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said >= _LINE_EVERY:
            self._said = now
            self.console.print(text)

    def checking(self, plan: Plan) -> None:
        count = len(plan.matrices)
        self.console.print(f"looking for NaN and infinity: reading {count} matrices one extra time (--allow-nonfinite)")

    def start(self, plan: Plan, finished: Mapping[str, MatrixRecord | None]) -> None:
        self.started = time.monotonic()
        self.total = sum(unit.source.nbytes for unit in plan.matrices)
        self.matrices = len(plan.matrices)
        widths = "/".join(str(b) for b in sorted({u.matrix.grid.bits for u in plan.matrices if u.matrix}))
        self.console.print(
            f"{plan.modules.architecture or 'checkpoint'}: {self.matrices} matrices of {size_text(self.total)} to "
            f"{widths} bits ({plan.recipe.format}), {len(plan.kept)} tensors copied",
            soft_wrap=True,
        )
        if finished:
            self.console.print(f"resuming: {len(finished)} of {len(plan.units)} tensors are done already")
        self.records = [record for record in finished.values() if record is not None]
        done = {record.tensor for record in self.records}
        self.done_bytes = self._before = sum(unit.source.nbytes for unit in plan.matrices if unit.tensor in done)
        for note in plan.notes:
            warn(note)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def done(self, unit: Unit, record: MatrixRecord | None) -> None:
        if record is not None:
            self.records.append(record)
            self.done_bytes += unit.source.nbytes

    @property
    def rate(self) -> float:
        return (self.done_bytes - self._before) / max(1e-9, time.monotonic() - self.started)

    def left(self) -> str:
        """Return the time left, or "…" while there is too little to tell it from."""
        if time.monotonic() - self.started < _SURE_AFTER or not self.rate:
            return "…"
        return duration((self.total - self.done_bytes) / self.rate)

    def mean_text(self) -> str:
        """Return the mean residuals so far, `0.5602 → 0.4591`, plain and kept; "" before the first matrix."""
        if not self.records:
            return ""
        count = len(self.records)
        plain = sum(record.plain_residual for record in self.records) / count
        kept = sum(record.residual for record in self.records) / count
        return f"{plain:.4f} → {kept:.4f}"


class LineReporter(_Counting):
    """Prints a line every few seconds, or with `verbose` one for every matrix."""

    def __init__(self, console: Console, verbose: bool) -> None:
        super().__init__(console)
        self._verbose = verbose
        self._last = time.monotonic()

    def done(self, unit: Unit, record: MatrixRecord | None) -> None:
        super().done(unit, record)
        if record is None:
            return
        if self._verbose:
            residuals = f"residual {record.plain_residual:.4f} → {record.residual:.4f}"
            what = f"{record.module} {list(record.shape)} {record.bits} bits"
            line = f"{len(self.records)}/{self.matrices} {what}, {residuals}, mean {self.mean_text()}"
            self.console.print(line, soft_wrap=True)
            return
        now = time.monotonic()
        if now - self._last >= (_LINE_EVERY if now - self.started < _FIRST else _LATER_EVERY):
            self._last = now
            self.console.print(self._line(record.module), soft_wrap=True)

    def _line(self, module: str) -> str:
        """Return where the conversion stands in one line of 80 columns; the module is cut at the left to fit."""
        line = f"{len(self.records)}/{self.matrices}, {size_text(self.rate)}/s, {self.left()} left, mean residual "
        line += self.mean_text()
        return f"{line}, {_short(module, max(12, 78 - len(line)))}"

    def finishing(self, step: str) -> None:
        self.console.print(step)


class _TwoLines(Progress):
    """A bar, and below it the current matrix and the mean residuals, plain and kept."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["below"], style="dim", no_wrap=True, overflow="crop")


class LiveReporter(_Counting):
    """Shows a bar with matrices, bytes, rate and time left; below it, the current matrix and the residuals."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._module = ""
        self._bar = _TwoLines(
            TextColumn("{task.fields[count]}", markup=False),
            BarColumn(bar_width=min(_LONGEST_BAR, max(_SHORTEST_BAR, console.width - _BESIDE_BAR))),
            TextColumn("{task.fields[amount]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
        )

    def start(self, plan: Plan, finished: Mapping[str, MatrixRecord | None]) -> None:
        super().start(plan, finished)
        self._task = self._bar.add_task("", total=self.total, completed=self.done_bytes, **self._fields())
        self._bar.start()

    def working(self, unit: Unit) -> None:
        if unit.matrix is not None:
            self._module = unit.matrix.module
            self._bar.update(self._task, **self._fields())

    def done(self, unit: Unit, record: MatrixRecord | None) -> None:
        super().done(unit, record)
        self._bar.update(self._task, completed=self.done_bytes, **self._fields())

    def finishing(self, step: str) -> None:
        self._module = step
        self._bar.update(self._task, **self._fields())

    def close(self) -> None:
        self._bar.stop()

    def _fields(self) -> dict[str, Any]:
        done, total = size_text(self.done_bytes), size_text(self.total)
        below = f"residual {self.mean_text()}" if self.records else ""
        room = self.console.width - len(below) - 2
        return {
            "count": f"{len(self.records)}/{self.matrices}",
            "amount": f"{done} of {total}, {size_text(self.rate)}/s, {self.left()} left",
            "below": f"{below}  {_short(self._module, room)}".strip() if room >= _SHORTEST_BAR else below,
        }


def _short(module: str, width: int) -> str:
    return module if len(module) <= width else f"…{module[-width + 1 :]}"
