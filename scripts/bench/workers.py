"""Two single-thread workers against one, beside what the machine itself gives two independent single-thread loops of
matrix products against one (two cores may be two threads of one physical core). Run it on an idle machine.

    python scripts/bench/workers.py 1b --work /somewhere/with/space

The bar: share = speed-up of the workers / speed-up of the loops >= 0.85. Loops run before, between and after the
conversions. Results are added to scripts/bench/results/workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from machine import describe_machine, save_result
from rich.console import Console
from synthetic import SHAPES, write_checkpoint

# Reports when it is ready and waits for a signal, so that start-up does not count; prints its seconds.
_LOOP = """
import sys, time, torch
torch.set_num_threads(1)
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
for _ in range(3): a @ b
print("ready", flush=True); sys.stdin.readline()
started = time.perf_counter()
for _ in range(int(sys.argv[1])): a @ b
print(time.perf_counter() - started, flush=True)
"""
_ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def loop_seconds(processes: int, products: int) -> float:
    """Return the seconds until the last of several loops that start together has ended."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _LOOP, str(products)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_ONE_THREAD,
        )
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in running)


def loop_speedup(products: int) -> float:
    """Return the throughput of two loops divided by that of one."""
    return 2 * loop_seconds(1, products) / loop_seconds(2, products)


def convert(source: Path, output: Path, workers: int, recipe: list[str]) -> float:
    """Return the seconds of a conversion from its manifest, including the start of workers."""
    words = [sys.executable, "-m", "loftq_cli", "quantize", str(source), "-o", str(output), "--json", "--device", "cpu"]
    words += ["--overwrite", "--num-processes", str(workers), *recipe]
    done = subprocess.run(words, env=_ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)["totals"]["seconds"]


def same_weights(first: Path, second: Path) -> bool:
    """Return True if two outputs have identical weight files."""
    names = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    return all(subprocess.run(["cmp", first / name, second / name], check=False).returncode == 0 for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--products", type=int, default=400, help="of each loop")
    parser.add_argument("--repeats", type=int, default=1)
    options, recipe = parser.parse_args(), ["--bits", "2", "--rank", "64", "--iters", "5"]
    source, one, two = (options.work / name for name in (options.shape, "one-worker", "two-workers"))
    if not (source / "config.json").exists():
        write_checkpoint(SHAPES[options.shape], source)
    loops, alone, together = [loop_speedup(options.products)], [], []
    for _ in range(options.repeats):
        alone.append(convert(source, one, 1, recipe))
        loops.append(loop_speedup(options.products))
        together.append(convert(source, two, 2, recipe))
        loops.append(loop_speedup(options.products))
    result: dict[str, Any] = {
        "one_worker_seconds": alone,
        "two_workers_seconds": together,
        "speedup": round(median(alone) / median(together), 3),
        "loop_speedups": [round(value, 3) for value in loops],
        "identical": same_weights(one, two),
        "machine": describe_machine(),
    }
    result["share"] = round(result["speedup"] / median(loops), 3)
    shutil.rmtree(one)
    shutil.rmtree(two)
    Console().print_json(data=result)
    Console().print(f"saved in {save_result('workers', options.shape, result)}")
    raise SystemExit(0 if result["identical"] and result["share"] >= 0.85 else 1)


if __name__ == "__main__":
    main()
