"""Residuals of the fast low-rank step against exact ones, on every matrix of trained models.

    python scripts/bench/quality.py MODEL_DIR... --rank 4 16 64 --bits 2 4
    python scripts/bench/quality.py MODEL_DIR... --rank 16 64 --bits 2 4 --stack 2

Per matrix the residual of the best of T steps over that of the same algorithm with exact SVDs. Prints and keeps the
distribution in scripts/bench/results/quality.json. Below 512 columns the fast step is an exact one; `--stack 2` lays
equal matrices two by two, so that small models say something of the Krylov space on trained weights too.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, save_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.methods.loftq import exact_step, fast_step, loftq

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def matrices(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices that `loftq quantize` would quantize, in float32 [out, in]."""
    plan = loftq_cli.plan(folder, bits=2)
    with contextlib.closing(open_checkpoint(folder)) as checkpoint:
        for unit in plan.matrices:
            weight = checkpoint.read(unit.tensor).float()
            yield unit.tensor, weight.T.contiguous() if unit.kind == "conv1d" else weight


def stacked(found: Iterator[tuple[str, Tensor]], side: int) -> Iterator[tuple[str, Tensor]]:
    """Join consecutive matrices of equal shape into blocks of `side` by `side`; the remainder is dropped."""
    waiting: dict[torch.Size, list[Tensor]] = {}
    for name, weight in found:
        group = waiting.setdefault(weight.shape, [])
        group.append(weight)
        if len(group) == side * side:
            rows = [torch.cat(group[i : i + side], dim=1) for i in range(0, side * side, side)]
            yield name, torch.cat(rows)
            group.clear()


def ratios(folder: Path, bits: int, rank: int, iters: int, side: int) -> list[float]:
    """Fast over exact, the best step of each, for every matrix."""
    from loftq_cli.numerics.grids.blocks import BlockGrid
    from loftq_cli.numerics.grids.codebooks import codebook

    quantizer = block_quantizer(BlockGrid(codebook("nf", bits), 64, "rows", torch.float32, torch.float32), "cpu")
    found = []
    for _, weight in stacked(matrices(folder), side):
        exact = loftq(weight, quantizer, iters=iters, low_rank=exact_step(min(rank, *weight.shape)))
        fast = loftq(weight, quantizer, iters=iters, low_rank=fast_step(rank, torch.Generator().manual_seed(0)))
        found.append(fast.residual / exact.residual)
    return found


def bench(folder: Path, bits: int, rank: int, iters: int, side: int) -> dict[str, Any]:
    found = torch.tensor(ratios(folder, bits, rank, iters, side), dtype=torch.float64)
    quantiles = torch.quantile(found, torch.tensor(_QUANTILES, dtype=torch.float64))
    return {
        "matrices": found.numel(),
        "mean": round(float(found.mean()), 6),
        "quantiles": {str(q): round(float(value), 6) for q, value in zip(_QUANTILES, quantiles, strict=True)},
        "above_0.1_percent": int((found > 1.001).sum()),
        "ratios": [round(value, 6) for value in sorted(found.tolist())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--stack", type=int, default=1, metavar="N", help="N x N equal matrices as one")
    asked = parser.parse_args()
    table = Table("model", "bits", "rank", "matrices", "mean", *(f"q{q:g}" for q in _QUANTILES), "above 0.1 %")
    for model in asked.models:
        for bits in asked.bits:
            for rank in asked.rank:
                result = bench(model, bits, rank, asked.iters, asked.stack)
                name = model.parent.name if model.name == "model" else model.name
                name += f" {asked.stack}x{asked.stack}" if asked.stack > 1 else ""
                save_result(
                    "quality",
                    f"{name} nf{bits} r{rank} T{asked.iters}",
                    {"machine": describe_machine(), **result},
                )
                quantiles = (f"{value:.5f}" for value in result["quantiles"].values())
                table.add_row(
                    name, str(bits), str(rank), str(result["matrices"]), f"{result['mean']:.5f}", *quantiles,
                    str(result["above_0.1_percent"]),
                )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
