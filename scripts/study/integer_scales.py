"""How the rule for scales changes the residual of 2-bit backbones, on real checkpoints.

    python scripts/study/integer_scales.py NAME=DIR [NAME=DIR ...]

Converts each checkpoint with every recipe below (group 64, rank 16, T = 5) and writes mean residuals, plain and with
the adapter, to results/integer_scales.json and .md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import loftq_cli

RESULTS = Path(__file__).parent / "results"

RECIPES: dict[str, dict[str, Any]] = {
    "NF2, absmax (packed)": {"data_type": "nf"},
    "symmetric NF2, absmax (packed)": {"data_type": "nf-sym"},
    "uniform, absmax (packed)": {"data_type": "uniform"},
    "int symmetric, absmax": {"data_type": "int", "symmetric": True, "scale": "absmax"},
    "int symmetric, minmax": {"data_type": "int", "symmetric": True, "scale": "minmax"},
    "int symmetric, mse": {"data_type": "int", "symmetric": True, "scale": "mse"},
    "int zero point, minmax": {"format": "compressed-tensors", "symmetric": False, "scale": "minmax"},
    "int zero point, mse": {"format": "compressed-tensors", "symmetric": False, "scale": "mse"},
    "int float zero, minmax": {"data_type": "int", "symmetric": False, "scale": "minmax"},
    "int float zero, mse": {"data_type": "int", "symmetric": False, "scale": "mse"},
}


@dataclass(frozen=True)
class Row:
    """Means over a checkpoint's matrices of ‖W - Q‖ / ‖W‖ and of ‖W - Q - BA‖ / ‖W‖."""

    checkpoint: str
    grid: str
    bits_effective: float
    plain: float
    loftq: float
    matrices: int
    worse_than_nf2: int


def main(arguments: list[str]) -> None:
    rows: list[Row] = []
    for argument in arguments:
        name, _, folder = argument.partition("=")
        nf2: dict[str, float] = {}
        for grid, recipe in RECIPES.items():
            with tempfile.TemporaryDirectory() as scratch:
                manifest = loftq_cli.quantize(
                    folder, output=Path(scratch) / "out", bits=2, rank=16, iters=5, **{"format": "packed", **recipe}
                )
            residuals = {record.tensor: record.residual for record in manifest.matrices}
            nf2 = nf2 or residuals
            worse = sum(residual > nf2[tensor] for tensor, residual in residuals.items())
            totals = manifest.totals
            measured = totals.bits_effective, totals.plain_residual, totals.residual
            rows.append(Row(name, grid, *measured, totals.matrices, worse))
            print(rows[-1], file=sys.stderr, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "integer_scales.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (RESULTS / "integer_scales.md").write_text(table(rows))


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "# Scales of 2-bit backbones",
        "",
        "Group 64, rank 16, T = 5; means over all matrices. Made by `scripts/study/integer_scales.py`.",
        "",
        "| checkpoint | grid, rule | bits a weight | ‖W−Q‖/‖W‖ plain | with the adapter | matrices above NF2 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.checkpoint} | {row.grid} | {row.bits_effective:.2f} | {row.plain:.4f} | {row.loftq:.4f} | "
            f"{row.worse_than_nf2} of {row.matrices} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
