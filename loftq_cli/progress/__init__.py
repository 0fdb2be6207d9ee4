"""Progress events of the engine; the terminal and the tests implement the receiver."""

from __future__ import annotations

from collections.abc import Mapping

from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit


class Reporter:
    """A receiver that ignores every event. Subclasses override what they show; no method may raise."""

    def measuring(self, done: int, total: int) -> None:
        """Matrix `done` of `total` has been measured, before the plan is made."""

    def checking(self, plan: Plan) -> None:
        """Every matrix is about to be read once, to find those with NaN or infinity."""

    def comparing(self, done: int, total: int) -> None:
        """Of `total` converted matrices, `done` have been compared with the source, whose files look changed."""

    def start(self, plan: Plan, finished: Mapping[str, MatrixRecord | None]) -> None:
        """Work begins; an earlier run finished the tensors in `finished`, which maps them to their records."""

    def note(self, text: str) -> None:
        """Show a sentence about the current step."""

    def working(self, unit: Unit) -> None:
        """Work on a unit begins; reported once, before `done`, but late if other processes do the work."""

    def done(self, unit: Unit, record: MatrixRecord | None) -> None:
        """A unit's bytes are on disk; `record` is None for a copied tensor."""

    def finishing(self, step: str) -> None:
        """All units are done; files are being hashed or moved."""

    def finish(self, manifest: Manifest) -> None:
        """The output is complete."""

    def close(self) -> None:
        """The run has ended, successfully or not."""
