"""Cost of the refined method compared with plain LoftQ: whole conversions of a Llama-shaped checkpoint in one run.

    python scripts/bench/refined.py 1b --work /somewhere/with/space

Both methods use their default steps and take turns, so that other load on the machine affects both. Every conversion
runs the command line in its own process. Results are added to scripts/bench/results/refined.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from conversion import convert_once
from machine import describe_machine, save_result
from rich.console import Console
from rich.table import Table
from synthetic import SHAPES, write_checkpoint

CASES = ((2, 64, "nf"), (2, 64, "fitted"), (4, 16, "nf"))  # bits, rank, levels of the refined method


def compare(source: Path, case: tuple[int, int, str], rounds: int, device: str) -> dict[str, Any]:
    """Median wall seconds of the process with either method, and their ratio."""
    bits, rank, levels = case
    output = source.with_name(f"{source.name}-out")
    same = {"bits": bits, "rank": rank, "format": "packed"}
    recipes = {"loftq": {**same, "method": "loftq"}, "refined": {**same, "method": "refined", "levels": levels}}
    walls: dict[str, list[float]] = {name: [] for name in recipes}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        for name, recipe in recipes.items():
            totals = convert_once(source, output, recipe, device)
            shutil.rmtree(output)
            walls[name].append(totals["wall_seconds"])
            peaks[name] = totals["peak_memory_bytes"]
    medians = {name: statistics.median(times) for name, times in walls.items()}
    return {
        "shape": source.name,
        "bits": bits,
        "rank": rank,
        "levels": levels,
        "device": device,
        "wall_seconds": walls,
        "peak_memory_bytes": peaks,
        "ratio": round(medians["refined"] / medians["loftq"], 2),
    }


def report(results: list[dict[str, Any]]) -> None:
    """The ratios as a table."""
    table = Table("shape", "bits", "rank", "levels", "loftq s", "refined s", "ratio")
    for result in results:
        seconds = [f"{statistics.median(result['wall_seconds'][name]):.1f}" for name in ("loftq", "refined")]
        kind = [str(result[name]) for name in ("shape", "bits", "rank", "levels")]
        table.add_row(*kind, *seconds, f"{result['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--work", type=Path, required=True, help="Folder for checkpoints and outputs.")
    parser.add_argument("--rounds", type=int, default=1, help="Conversions with either method.")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model = arguments.work / arguments.shape
    if not (model / "config.json").exists():
        write_checkpoint(SHAPES[arguments.shape], model)
    found = [compare(model, case, arguments.rounds, arguments.device) for case in CASES]
    for result in found:
        key = " ".join(str(result[name]) for name in ("shape", "bits", "rank", "levels", "device"))
        save_result("refined", key, {**result, "machine": describe_machine()})
    report(found)
