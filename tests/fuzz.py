"""Seeded fuzzing of everything a user can point loftq at: checkpoints, recipes, adapters, outputs, unfinished states.

    python tests/fuzz.py --cases 2000 --seed 1        # by hand; `--only N` repeats one case and keeps its files

Every case damages something in one to three places, runs a command in this process and judges the end: a documented
exit code; on failure one sentence and nothing that looks like a model; on success files that hash to what the manifest
says and that `loftq verify` agrees with; nothing executed, nothing written or deleted elsewhere, no more than ten
seconds and a bounded amount of memory. The parts are in `tests/support/fuzzing/`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from support.fuzzing.hub import loopback_hub
from support.fuzzing.runner import Fuzzer, Outcome
from support.fuzzing.table import Table

_IN_MEMORY = Path("/dev/shm")
_WRITE_EVERY = 50  # cases, so that a run that is stopped leaves a table


def main() -> int:
    chosen = _parsed()
    torch.set_num_threads(1)
    in_memory = "TMPDIR" not in os.environ and os.access(_IN_MEMORY, os.W_OK)
    root = Path(tempfile.mkdtemp(prefix="loftq-fuzz-", dir=_IN_MEMORY if in_memory else None))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    table, started = Table(chosen.seed), time.monotonic()
    with loopback_hub(root / "cache") as hub:
        fuzzer = Fuzzer(root, chosen.seed, hub)
        for number in range(chosen.start, chosen.start + chosen.cases) if chosen.only is None else [chosen.only]:
            outcome = _run(fuzzer, number, keep=chosen.only is not None)
            table.add(outcome)
            for finding in outcome.findings:
                print(f"case {number} ({outcome.kind}; {outcome.command}, {outcome.damage}): {finding}", flush=True)
            if chosen.only is not None:
                print(f"{outcome.kind}; {outcome.command}, {outcome.damage}: exit code {outcome.code} after ", end="")
                print(f"{outcome.seconds:.1f} s and {outcome.grown / 1e6:.0f} MB: {outcome.said}\n{root}")
            if chosen.table is not None and number % _WRITE_EVERY == 0:
                table.write(chosen.table, time.monotonic() - started)
    seconds = time.monotonic() - started
    print(table.summary(seconds))
    if chosen.table is not None:
        table.write(chosen.table, seconds)
    if chosen.only is None:
        shutil.rmtree(root, ignore_errors=True)
    return bool(table.findings)


def _run(fuzzer: Fuzzer, number: int, *, keep: bool) -> Outcome:
    """Run a case; what goes wrong in the fuzzer itself is a finding too, and does not end it."""
    try:
        return fuzzer.run(number, keep=keep)
    except Exception:
        return Outcome(number, "fuzzer", -1, "", 0.0, [f"the fuzzer fails:\n{traceback.format_exc()}"], "fuzzer")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone, keep its files and print what it said")
    parser.add_argument("--table", type=Path, help="write what was generated, and how it ended, as JSON to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
