"""Flip single bits at random places of a converted directory; `loftq verify` must find and name every one.

    python scripts/soak/flips.py path/to/output --flips 200

The places are uniform over all bytes of all files for one half, and over the files for the other, so that small files
get their share. The directory is left as it was.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import loftq_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    sizes = {p: p.stat().st_size for p in sorted(options.output.rglob("*")) if p.is_file()}
    assert loftq_cli.verify(options.output).ok, "give a directory that is as it was written"
    missed, hit = [], dict.fromkeys(sizes, 0)
    for number in range(options.flips):
        weights = list(sizes.values()) if number % 2 else None
        path = rng.choices(list(sizes), weights)[0]
        position, bit = rng.randrange(sizes[path]), rng.randrange(8)
        hit[path] += 1
        flip(path, position, bit)
        found = loftq_cli.verify(options.output)
        flip(path, position, bit)
        if [problem.name for problem in found.problems] != [path.relative_to(options.output).as_posix()]:
            missed.append((path, position, bit))
    assert loftq_cli.verify(options.output).ok
    for path, count in hit.items():
        print(f"{count:4} in {path.relative_to(options.output)} ({sizes[path]} bytes)")
    print(f"{options.flips - len(missed)} of {options.flips} flipped bits found and named (seed {options.seed})")
    raise SystemExit(f"missed: {missed}" if missed else 0)


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ (1 << bit)]))


if __name__ == "__main__":
    main()
