"""Processor and wall time of one `loftq quantize` of a small model as a whole process, start-up included.

    python scripts/bench/startup.py MODEL --against OTHER_CHECKOUT

Runs of both checkouts alternate, so that both meet the same load; the least of each counts. Each checkout runs with an
empty cache folder ("first") and with the one that its first run filled ("again"); compiled kernels and the page cache
are warm in both. The result is added to scripts/bench/results/startup.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import describe_machine, save_result

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Seconds:
    """Of one process: user and system time of the processor, and time on the clock."""

    cpu: float
    wall: float


def measure(checkout: Path, words: list[str], cache: Path) -> Seconds:
    """Run `python -m loftq_cli` in a checkout, which comes first on Python's path, with this cache folder."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "loftq_cli", *words], check=True, env=env, cwd=checkout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(round(cpu, 2), round(time.perf_counter() - started, 2))


def compare(model: Path, checkouts: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Return the least seconds of each checkout, with an empty cache folder and with a filled one."""
    found: dict[str, list[Seconds]] = {}
    with tempfile.TemporaryDirectory() as work:
        for repeat in range(repeats + 1):
            for name, checkout in checkouts.items():
                cache = Path(work) / f"cache-{name}-{repeat}"
                for kind in ("first", "again"):
                    words = ["quantize", str(model), "-o", str(Path(work) / f"{name}-{repeat}-{kind}"), "--quiet"]
                    seconds = measure(checkout, words, cache)
                    print(
                        f"{repeat} {name:6} {kind:5} cpu {seconds.cpu:6.2f} s  wall {seconds.wall:6.2f} s", flush=True
                    )
                    if repeat:  # the first round compiles the kernels and reads the disk
                        found.setdefault(f"{name}, {kind}", []).append(seconds)
    return {
        name: asdict(Seconds(min(run.cpu for run in runs), min(run.wall for run in runs)))
        for name, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout of loftq, which is measured as 'before'")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    checkouts = {"now": ROOT} if asked.against is None else {"before": asked.against.resolve(), "now": ROOT}
    seconds = compare(asked.model.resolve(), checkouts, asked.repeats)
    result = {**describe_machine(), "seconds": seconds}
    if asked.against is not None:
        least = {name: run["cpu"] for name, run in seconds.items()}
        result["cpu_share"] = {k: round(least[f"now, {k}"] / least[f"before, {k}"], 3) for k in ("first", "again")}
    print(result)
    save_result("startup", asked.model.name, result)


if __name__ == "__main__":
    main()
