"""One matrix: our LoftQ against the full-SVD algorithm that PEFT and the paper's code run, in one process.

    python scripts/bench/matrix.py 1024 4096 --rank 64 --bits 2
    python scripts/bench/matrix.py 5120x13824 --full

Both run the same T steps on the same blocks of the same weights with the same threads. The peers' algorithm is restated
in plain torch: boundary search for the codes, `torch.linalg.svd` of every residual, the last iterate. Larger matrices
take it minutes, so there it runs only with --full and is never extrapolated. Results are added to
scripts/bench/results/matrix.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from machine import describe_machine, save_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loftq_cli.kernels import block_quantizer
from loftq_cli.machine.memory import shared_memory
from loftq_cli.machine.openmp import openmp_spin_env
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import Codebook, codebook
from loftq_cli.numerics.methods.loftq import fast_step, loftq

_BLOCK = 64
_LARGEST_BASELINE = 4096 * 4096
_REPEATS = 3  # of our method, before and after the baseline; the best counts, because the machine may be shared


@dataclass(frozen=True)
class Case:
    """One matrix [rows, columns] and how it is quantized."""

    rows: int
    columns: int
    rank: int
    bits: int
    iters: int

    @property
    def key(self) -> str:
        return f"{self.rows}x{self.columns} nf{self.bits} r{self.rank} T{self.iters}"


def weights(rows: int, columns: int) -> Tensor:
    """A slowly decaying spectrum: 6 % of the energy in 64 directions over noise, the scale of a trained matrix."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, columns, generator=generator)
    strength = torch.arange(1, 65).float().rsqrt()
    leading = torch.randn(rows, 64, generator=generator) * strength @ torch.randn(64, columns, generator=generator)
    return 0.02 * (0.94**0.5 * noise / noise.std() + 0.06**0.5 * leading / leading.std())


def full_svd_loftq(weight: Tensor, book: Codebook, rank: int, iters: int) -> list[float]:
    """LoftQ's Algorithm 1 as its users run it today; ‖W - Q - BA‖ / ‖W‖ after every step."""
    levels = torch.tensor(book.levels)
    boundaries = (levels[1:] + levels[:-1]) / 2
    product, residuals = torch.zeros_like(weight), []
    for _ in range(iters):
        blocks = (weight - product).reshape(-1, _BLOCK)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        codes = torch.bucketize(blocks / absmax, boundaries)
        backbone = (levels[codes] * absmax).reshape(weight.shape)
        u, s, vh = torch.linalg.svd(weight - backbone, full_matrices=False)
        product = (u[:, :rank] * s[:rank].sqrt()) @ (s[:rank].sqrt()[:, None] * vh[:rank])
        residuals.append(float((weight - backbone - product).norm() / weight.norm()))
    return residuals


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def bench(case: Case, full: bool) -> dict[str, Any]:
    """Time and residuals of both, and their ratios where the baseline ran."""
    weight, book = weights(case.rows, case.columns), codebook("nf", case.bits)
    grid = BlockGrid(book, _BLOCK, "rows", torch.float32, torch.float32)
    quantizer = block_quantizer(grid, "cpu")  # compiles, or loads the compiled code from the cache

    def ours() -> Any:
        return loftq(
            weight, quantizer, iters=case.iters, low_rank=fast_step(case.rank, torch.Generator().manual_seed(0))
        )

    runs = [timed(ours) for _ in range(_REPEATS)]
    baseline = None
    if full or case.rows * case.columns <= _LARGEST_BASELINE:
        baseline = timed(lambda: full_svd_loftq(weight, book, case.rank, case.iters))
        runs += [timed(ours) for _ in range(_REPEATS)]
    seconds, result = min(runs, key=lambda run: run[0])
    record: dict[str, Any] = {
        "ours": {
            "seconds": round(seconds, 3),
            "all_seconds": [round(run[0], 3) for run in runs],
            "residuals": [round(value, 6) for value in result.residuals],
        }
    }
    if baseline is not None:
        svd_seconds, residuals = baseline
        record["full_svd"] = {"seconds": round(svd_seconds, 2), "residuals": [round(value, 6) for value in residuals]}
        record["times_faster"] = round(svd_seconds / seconds, 1)
        record["residual_ratios"] = [round(a / b, 6) for a, b in zip(result.residuals, residuals, strict=True)]
        record["kept_residual_ratio"] = round(result.residual / min(residuals), 6)
    return record


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table("matrix", "ours s", "full SVD s", "times faster", "residual ratio per step")
    for key, record in results.items():
        ratios = " ".join(f"{value:.5f}" for value in record.get("residual_ratios", []))
        baseline, faster = record.get("full_svd", {}).get("seconds", "-"), record.get("times_faster", "-")
        table.add_row(key, str(record["ours"]["seconds"]), str(baseline), str(faster), ratios or "-")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["1024", "4096"], help="N or ROWSxCOLUMNS")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="run the full-SVD baseline on any size")
    asked = parser.parse_args()
    # Both sides run in the command line's environment; torch has already read its own.
    if missing := openmp_spin_env(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    results = {}
    for size in asked.sizes:
        rows, _, columns = size.partition("x")
        for rank in asked.rank:
            for bits in asked.bits:
                case = Case(int(rows), int(columns or rows), rank, bits, asked.iters)
                with shared_memory(keeps=True):  # as a conversion does for matrices of these sizes; both sides benefit
                    results[case.key] = bench(case, asked.full)
                save_result("matrix", case.key, {"machine": describe_machine(), **results[case.key]})
    show(results)


if __name__ == "__main__":
    main()
