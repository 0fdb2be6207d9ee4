"""One case: a folder with damaged files, and a command line that reads them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MARK = "harm done"
FLAGS = ("--bits", "2", "--rank", "2", "--iters", "1", "--block-size", "32", "--device", "cpu")


@dataclass
class Case:
    """A folder for one case: what is read in `source` and elsewhere, the output in `out`.

    Attributes:
        words: the command's arguments after its name, or for `quantize` and `plan` those that come after the output.
        damage: the kind of damage, for the table.
        reference: sha256 of every weight file, if the result must be that of an undisturbed run.
        sound: the finished output that `source` was copied from, if it must be unchanged for `verify` to succeed.
        origin: the model that was converted, if `verify --source` must succeed on the result.
        before: names of what was in the output before the command.
    """

    root: Path
    rng: random.Random
    words: list[str] = field(default_factory=list)
    command: str = "quantize"
    damage: str = ""
    reference: dict[str, str] = field(default_factory=dict)
    sound: Path | None = None
    origin: Path | None = None
    before: set[str] = field(default_factory=set)

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def mark(self) -> Path:
        return self.root / MARK

    def command_line(self, model: str) -> list[str]:
        if self.command not in ("quantize", "plan"):
            return [*self.command.split(), *self.words]
        recipe = self.root / "recipe.yaml"
        named = recipe.exists() and b"model:" in recipe.read_bytes()
        words = [self.command, *([] if named else [model]), "-o", str(self.out), *self.words]
        words += FLAGS if not recipe.exists() else ()
        return words + (["-q"] if self.command == "quantize" else [])

    def edit(self, name: str, how: Callable[[random.Random, bytes], bytes]) -> None:
        """Damage a file of the source."""
        path = self.source / name
        path.write_bytes(how(self.rng, path.read_bytes()))
        self.damage = f"{name}: {how.__name__.removeprefix('damage_')}"
