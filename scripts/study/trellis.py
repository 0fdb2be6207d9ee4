"""Residuals of `refined` with a trellis beside those with fitted levels, matrix by matrix, at equal stored bits.

    python scripts/study/trellis.py minilm --bits 2 3 4
    python scripts/study/trellis.py llama --model MODEL --bits 2
    python scripts/study/trellis.py gemma --model MODEL --bits 2 --every 20
    python scripts/study/trellis.py --report

The first three add to scripts/study/results/trellis-NAME.json, saving after every matrix, and go on where they stopped;
matrices are taken in an order that spreads over the model, so that the first ones are a fair sample. The numbers for
fitted levels are those of residuals.py where it has them, and measured here otherwise. The last prints and writes the
table (trellis.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from residuals import matrices, minilm
from study import RESULTS, describe_machine
from torch import Tensor

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.numerics.methods.refined import TRELLIS_FEEDBACK, refined
from loftq_cli.numerics.methods.refined_steps import shallow_steps

REPORT = RESULTS / "trellis.md"
FITTED = "refined, fitted"
STATES = {"trellis": 10, "trellis-fast": 8}  # levels, and bits of a state
BLOCK = 64


def trellis_residual(weight: Tensor, dtype: torch.dtype, bits: int, rank: int, state_bits: int) -> float:
    """The residual with a trellis."""
    grid = TrellisGrid(bits, state_bits, BLOCK, dtype, dtype)
    steps = shallow_steps(rank, torch.Generator().manual_seed(0))
    return refined(weight, block_quantizer(grid, "cpu"), low_rank=steps, schedule=TRELLIS_FEEDBACK).residual


def fitted_residual(weight: Tensor, dtype: torch.dtype, bits: int, rank: int) -> float:
    """The residual with levels fitted to the matrix."""
    grid = BlockGrid(codebook("fitted", bits), BLOCK, "rows", dtype, dtype, signed=True)
    steps = shallow_steps(rank, torch.Generator().manual_seed(0))
    return refined(weight, block_quantizer(grid, "cpu"), low_rank=steps, levels=grid.levels()).residual


def known(name: str, key: str) -> dict[str, dict[str, float]]:
    """What residuals.py has for a model, by matrix."""
    file = RESULTS / f"residuals-{name}.json"
    return json.loads(file.read_text())["runs"].get(key, {}) if file.exists() else {}


def study(name: str, model: Path, bits: int, rank: int, every: int, levels: list[str]) -> None:
    """Measure what is missing."""
    file = RESULTS / f"trellis-{name}.json"
    key = f"{bits} bits r {rank}"
    dtype, weights = matrices(model)
    order = list(weights)[::every]
    stride = next(step for step in (7, 5, 3, 1) if len(order) % step)
    order = [order[i * stride % len(order)] for i in range(len(order))]
    before = known(name, key)
    for tensor, weight in order:
        kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"runs": {}}
        have = kept["runs"].get(key, {}).get(tensor, {})
        todo = [kind for kind in levels if kind not in have]
        if not todo:
            continue
        fitted = before[tensor][FITTED] if tensor in before else fitted_residual(weight, dtype, bits, rank)
        found = {"fitted": fitted, **{kind: trellis_residual(weight, dtype, bits, rank, STATES[kind]) for kind in todo}}
        kept = json.loads(file.read_text()) if file.exists() else {"runs": {}}
        kept["machine"] = describe_machine()
        runs = kept["runs"].setdefault(key, {})
        runs[tensor] = {**have, **{kind: round(value, 6) for kind, value in found.items()}}
        file.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, key, tensor, runs[tensor], flush=True)


def report() -> None:
    """Write the table."""
    lines = ["# Trellis", "", "| model | | levels | matrices | fitted levels | trellis | share |", "|---" * 7 + "|"]
    loaded = {
        file.stem.removeprefix("trellis-"): json.loads(file.read_text()) for file in RESULTS.glob("trellis-*.json")
    }
    for name, kept in sorted(loaded.items()):
        for key, found in kept["runs"].items():
            for kind in STATES:
                both = [one for one in found.values() if kind in one]
                if both:
                    fitted, trellis = (sum(one[which] for one in both) / len(both) for which in ("fitted", kind))
                    row = [name, key, kind, len(both), f"{fitted:.4f}", f"{trellis:.4f}", f"{trellis / fitted:.3f}"]
                    lines.append(f"| {' | '.join(map(str, row))} |")
    lines += [
        "",
        "Mean ‖W - Q - BA‖ / ‖W‖ of `refined`, at most 16 steps, blocks of 64, no data. `trellis` has 1024 states, "
        "`trellis-fast` 256. Where not all matrices were measured, they are spread over the model.",
        "",
        *(f"Machine of {name}: {json.dumps(kept['machine'])}" for name, kept in sorted(loaded.items())),
        "",
    ]
    REPORT.write_text("\n".join(lines))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="a name for the records; minilm needs no --model")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--every", type=int, default=1, help="take only every n-th matrix")
    parser.add_argument("--levels", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        report()
        return
    for bits in args.bits:
        study(args.name, minilm() if args.model is None else args.model, bits, args.rank, args.every, args.levels)


if __name__ == "__main__":
    main()
