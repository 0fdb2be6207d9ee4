"""Progress for Python: a bar of tqdm, which is a widget in a notebook and a line of text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.machine.printable import printable
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter


class BarReporter(Reporter):
    """Shows a bar for every stage that takes time; the conversion's is measured in bytes of the matrices."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._plain = self._kept = 0.0  # sums of the residuals so far
        self._matrices = 0

    def measuring(self, done: int, total: int) -> None:
        self._count("measuring", done, total)

    def comparing(self, done: int, total: int) -> None:
        self._count("comparing with the source", done, total)

    def checking(self, plan: Plan) -> None:
        self.note(f"looking for NaN and infinity: reading {len(plan.matrices)} matrices one extra time")

    def start(self, plan: Plan, finished: Mapping[str, MatrixRecord | None]) -> None:
        total = sum(unit.source.nbytes for unit in plan.matrices)
        for record in finished.values():
            self._add(record)
        done = sum(unit.source.nbytes for unit in plan.matrices if unit.tensor in finished)
        self._open("converting", total=total, initial=done, unit="B", unit_scale=True)
        for note in plan.notes:
            self.note(f"note: {note}")

    def note(self, text: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(printable(text), file=sys.stderr)

    def working(self, unit: Unit) -> None:
        if unit.matrix is not None:
            self._show(unit.matrix.module)

    def done(self, unit: Unit, record: MatrixRecord | None) -> None:
        self._add(record)
        if record is not None and self._bar is not None:
            self._show(record.module)
            self._bar.update(unit.source.nbytes)

    def finishing(self, step: str) -> None:
        self._show(step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _add(self, record: MatrixRecord | None) -> None:
        if record is not None:
            self._matrices += 1
            self._plain += record.plain_residual
            self._kept += record.residual

    def _show(self, step: str) -> None:
        """Show the mean residuals so far, plain and kept, and the current step."""
        if self._bar is None:
            return
        count, parts = self._matrices, [printable(step)]
        if count:
            parts.insert(0, f"residual {self._plain / count:.4f} → {self._kept / count:.4f}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def _count(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or self._stage != stage:
            self._open(stage, total=total, unit=" matrices")
        self._bar.update(done + 1 - self._bar.n)

    def _open(self, stage: str, **options: Any) -> None:
        from tqdm.auto import tqdm

        self.close()
        self._stage, self._bar = stage, tqdm(desc=stage, dynamic_ncols=True, **options)
