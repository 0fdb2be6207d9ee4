"""Flip single bits in the state of half-done conversions, then resume: the output must be that of an uninterrupted run,
byte for byte, or the command must end with one sentence and no output that looks finished.

    python scripts/soak/journal_flips.py path/to/model --flips 100

Half of the flips hit the journal, half any file in `.loftq`, weights included.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from flips import flip
from kills import contents

import loftq_cli
from loftq_cli.errors import LoftqError
from loftq_cli.progress import Reporter

RECIPE = {"bits": 2, "rank": 8, "iters": 2, "device": "cpu", "max_shard_size": "1MB"}


class Stop(Reporter):
    """Stops a conversion after a number of units."""

    def __init__(self, units: int) -> None:
        self.left = units

    def done(self, unit: object, record: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, ends = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        reference, half, out = (Path(folder) / name for name in ("reference", "half", "out"))
        loftq_cli.quantize(options.model, output=reference, **RECIPE)
        expected = contents(reference)
        units = len(loftq_cli.read_manifest(reference).matrices)
        for number in range(options.flips):
            if number % 10 == 0:
                shutil.rmtree(half, ignore_errors=True)
                with contextlib.suppress(KeyboardInterrupt):
                    loftq_cli.quantize(options.model, output=half, reporter=Stop(rng.randrange(2, units)), **RECIPE)
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(half, out)
            ends[one_flip(options.model, out, number % 2 == 0, expected, rng)] += 1
    print(f"{options.flips} flips (seed {options.seed}): {dict(ends)}")


def one_flip(model: Path, out: Path, journal: bool, expected: dict[str, bytes], rng: random.Random) -> str:
    """Return how the resumed conversion ended."""
    files = [path for path in sorted((out / ".loftq").rglob("*")) if path.is_file() and path.stat().st_size]
    chosen = [path for path in files if path.name.startswith("journal")] if journal else files
    path = rng.choice(chosen)
    flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
    try:
        loftq_cli.quantize(model, output=out, **RECIPE)
    except LoftqError as error:
        assert not (out / "config.json").exists() and "\n" not in str(error), f"{path}: {error!r}"
        return "refused"
    found = contents(out)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    assert not different and loftq_cli.verify(out).ok, f"{path.relative_to(out)}: {different}"
    return "identical"


if __name__ == "__main__":
    main()
