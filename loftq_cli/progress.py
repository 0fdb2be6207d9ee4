"""What the engine tells whoever watches; the terminal and the tests implement it."""

from __future__ import annotations

from collections.abc import Mapping

from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit


class Reporter:
    """Silent. Subclasses show what they like; none of these may raise."""

    def measuring(self, done: int, total: int) -> None:
        """Matrix `done` of `total` is measured, before there is a plan."""

    def checking(self, plan: Plan) -> None:
        """Every matrix is read once, to find those with NaN or infinity."""

    def start(self, plan: Plan, finished: Mapping[str, MatrixRecord | None]) -> None:
        """Work begins; `finished` tensors (with their records) were done by an earlier run."""

    def note(self, text: str) -> None:
        """A sentence about what is being done."""

    def working(self, unit: Unit) -> None:
        """A unit is taken up; told once and before it is done, though late where other processes do the work."""

    def done(self, unit: Unit, record: MatrixRecord | None) -> None:
        """A unit's bytes are on the disk; `record` is None for a copied tensor."""

    def finishing(self, step: str) -> None:
        """All units are done; files are hashed or moved."""

    def finish(self, manifest: Manifest) -> None:
        """The output is complete."""

    def close(self) -> None:
        """The run is over, one way or another."""
