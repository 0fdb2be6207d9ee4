"""Whole conversions of Llama-shaped checkpoints: seconds per billion parameters, peak memory, share of the floor.

    python scripts/bench/conversion.py 0.1b 1b 3b --work /somewhere/with/space

Checkpoints are made on first use and kept in the work folder; outputs are deleted. Every conversion runs the
command line in its own process. Results are added to scripts/bench/results/conversion.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from floor import count_products, floor_seconds, measure_rates
from machine import describe_machine, save_result
from rich.console import Console
from rich.table import Table
from synthetic import SHAPES, write_checkpoint

import loftq_cli


def convert_once(source: Path, output: Path, recipe: dict[str, Any], device: str) -> dict[str, Any]:
    """One `loftq quantize --json` with a cold page cache: its totals, and the wall time of the process."""
    _drop_cache(source)
    words = [sys.executable, "-m", "loftq_cli", "quantize", str(source), "-o", str(output), "--json", "--overwrite"]
    for name, value in recipe.items():
        words += [f"--{name}", str(value)]
    started = time.perf_counter()
    done = subprocess.run([*words, "--device", device], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"wall_seconds": round(wall, 2), **json.loads(done.stdout)["totals"]}


def estimate_once(source: Path, output: Path, recipe: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the estimate of `loftq plan`, run in its own process."""
    words = [sys.executable, "-m", "loftq_cli", "plan", str(source), "-o", str(output), "--json", "--device", device]
    for name, value in recipe.items():
        words += [f"--{name}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)["estimate"]
    return {"estimated_seconds": round(said["seconds"], 1), "estimated_peak_bytes": said["peak_memory_bytes"]}


def bench(name: str, work: Path, recipe: dict[str, Any], device: str) -> dict[str, Any]:
    """Convert one shape and compare it with the floor."""
    source, output = work / name, work / f"{name}-out"
    if not (source / "config.json").exists():
        write_checkpoint(SHAPES[name], source)
    plan = loftq_cli.plan(source, output=output, **recipe)
    estimated = estimate_once(source, output, recipe, device)
    totals = convert_once(source, output, recipe, device)
    shutil.rmtree(output)
    weights = plan.quantized_weights
    parameters = sum(math.prod(unit.source.shape) for unit in plan.units)
    result = {"shape": name, "recipe": recipe, "device": device, "parameters": parameters, **estimated, **totals}
    result["seconds_per_billion"] = round(totals["seconds"] / parameters * 1e9, 2)
    result["seconds_per_billion_quantized"] = round(totals["seconds"] / weights * 1e9, 2)
    if device == "cpu":
        rates = measure_rates(work, torch.get_num_threads())
        floor = floor_seconds(plan, count_products(plan), rates)
        torch.set_num_threads(rates.threads)
        result |= {"rates": dataclasses.asdict(rates), "floor_seconds": {k: round(v, 2) for k, v in floor.items()}}
        result["times_the_floor"] = round(totals["seconds"] / sum(floor.values()), 2)
    return result


def _drop_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def print_table(results: list[dict[str, Any]]) -> None:
    table = Table(title="whole conversions", title_justify="left")
    columns = "shape", "parameters", "seconds", "s / billion", "of quantized", "× floor", "peak memory", "residual"
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        peak = r["peak_device_memory_bytes"] or r["peak_memory_bytes"]
        table.add_row(
            r["shape"],
            f"{r['parameters'] / 1e9:.2f} b",
            f"{r['seconds']:.1f}",
            f"{r['seconds_per_billion']:.1f}",
            f"{r['seconds_per_billion_quantized']:.1f}",
            str(r.get("times_the_floor", "-")),
            f"{peak / 2**30:.2f} GiB",
            f"{r['plain_residual']:.4f} → {r['residual']:.4f}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and outputs")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    recipe = {name: getattr(arguments, name) for name in ("bits", "rank", "iters")}
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = [bench(name, arguments.work, recipe, arguments.device) for name in arguments.shapes]
    print_table(results)
    for result in results:
        key = f"{result['shape']} {arguments.bits} bits r{arguments.rank} T{arguments.iters} {arguments.device}"
        save_result("conversion", key, {**result, "machine": describe_machine()})


if __name__ == "__main__":
    main()
