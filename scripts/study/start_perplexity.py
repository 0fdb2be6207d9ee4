"""Perplexity of the small Llama at the start of training, before any step, for every method, width and rank.

    python scripts/study/start_perplexity.py --model MODEL --test WIKITEXT_TEST --calibrate WIKITEXT_VALID

Texts: WikiText-2's test text, which the model never saw, and technical documentation as in its own corpus (the Python
language reference that the interpreter ships). Calibrated methods are calibrated on WikiText-2's validation text only,
so that the second text also shows what calibration on another domain does. Everything is computed in float32. Writes
results/start_perplexity.{json,md,png}.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from study import COLOURS, RESULTS, Method, chosen, converted, markdown, put_weights, python_reference, save, windows
from torch import Tensor

WINDOW = 256
TEXTS = {"wikitext": "WikiText-2 test", "domain": "Python reference"}


def perplexity(model: torch.nn.Module, batch: Tensor) -> float:
    """exp of the mean next-token loss in windows."""
    total = 0.0
    with torch.no_grad():
        for rows in batch.split(8):
            total += float(model(input_ids=rows, labels=rows).loss) * len(rows)
    return math.exp(total / len(batch))


def measure(model: torch.nn.Module, texts: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(perplexity(model, batch), 4) for name, batch in texts.items()}


def run(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    raw = {"wikitext": arguments.test.read_text(encoding="utf-8"), "domain": python_reference()}
    ids = {name: tokenizer(text[: 20 * arguments.tokens], verbose=False)["input_ids"] for name, text in raw.items()}
    texts = {name: windows(found, WINDOW, arguments.tokens) for name, found in ids.items()}
    records: list[dict[str, Any]] = [{"method": "full precision", "perplexity": measure(model, texts)}]
    print(records[0])
    for bits in arguments.bits:
        for rank in arguments.ranks:
            for method in chosen(arguments.methods):
                if method.name == "QLoRA" and rank != arguments.ranks[0]:
                    continue  # its start has no adapter
                records.append(one(arguments, work, model, texts, method, bits, rank))
                print(records[-1], flush=True)
    return records


def one(
    arguments: argparse.Namespace,
    work: Path,
    model: torch.nn.Module,
    texts: dict[str, Tensor],
    method: Method,
    bits: int,
    rank: int,
) -> dict[str, Any]:
    path, manifest = converted(
        work, arguments.model, method, bits, rank, arguments.calibrate, arguments.calibration_tokens
    )
    put_weights(model, path, manifest)
    return {
        "method": method.name,
        "bits": bits,
        "rank": rank,
        "perplexity": measure(model, texts),
        "residual": manifest.totals.residual,
        "bits_stored": manifest.totals.bits_stored,
        "seconds": manifest.totals.seconds,
    }


def gap(record: dict[str, Any], records: list[dict[str, Any]], text: str) -> float | None:
    """(perplexity − full precision) / (LoftQ T5's − full precision) at the same bits and rank."""
    full = records[0]["perplexity"][text]
    for other in records[1:]:
        same = other["bits"] == record["bits"] and other["rank"] == record["rank"]
        if other["method"] == "LoftQ T5" and same:
            return (record["perplexity"][text] - full) / (other["perplexity"][text] - full)
    return None


def table(records: list[dict[str, Any]], tokens: int) -> str:
    full = records[0]["perplexity"]
    lines = [
        f"Perplexity of the small Llama before fine-tuning, first {tokens} tokens of each text in windows of {WINDOW}. "
        f"Full precision: {full['wikitext']:.2f} on {TEXTS['wikitext']}, {full['domain']:.2f} on {TEXTS['domain']}. In "
        "brackets the distance to full precision as a share of LoftQ T5's at the same bits and rank.\n"
    ]
    header = ["bits, rank", "method", *TEXTS.values(), "mean residual"]
    rows = []
    for record in records[1:]:
        shares = [gap(record, records, text) for text in TEXTS]
        values = [
            f"{record['perplexity'][text]:.2f}" + ("" if share is None else f" ({share:.2f})")
            for text, share in zip(TEXTS, shares, strict=True)
        ]
        rank = "any" if record["method"] == "QLoRA" else record["rank"]
        rows.append([f"{record['bits']}, {rank}", record["method"], *values, f"{record['residual']:.4f}"])
    return "\n".join([*lines, markdown(header, rows)])


def picture(records: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bits = sorted({record["bits"] for record in records[1:]})
    names = list(dict.fromkeys(record["method"] for record in records[1:]))
    figure, axes = plt.subplots(len(TEXTS), len(bits), figsize=(5 * len(bits), 8), squeeze=False, layout="constrained")
    for row, (text, title) in enumerate(TEXTS.items()):
        for column, width in enumerate(bits):
            axis = axes[row][column]
            for colour, name in zip(COLOURS, names, strict=False):
                found = [r for r in records[1:] if r["method"] == name and r["bits"] == width]
                points = [(r["rank"], r["perplexity"][text]) for r in found]
                if name == "QLoRA":
                    points = [(r["rank"], points[0][1]) for r in records[1:] if r["bits"] == width]
                axis.plot(*zip(*sorted(set(points)), strict=True), marker="o", markersize=4, color=colour, label=name)
            axis.axhline(records[0]["perplexity"][text], color="black", linestyle=":", label="full precision")
            axis.set(xscale="log", yscale="log", title=f"{title}, {width} bits", xlabel="rank", ylabel="perplexity")
            axis.set_xticks(sorted({r["rank"] for r in records[1:]}))
            axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.get_xaxis().set_minor_locator(matplotlib.ticker.NullLocator())
            axis.get_yaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.get_yaxis().set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.4g"))
    axes[0][0].legend(fontsize=8)
    figure.savefig(RESULTS / "start_perplexity.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a decoder with its tokenizer")
    parser.add_argument("--test", type=Path, required=True, help="WikiText-2 test text")
    parser.add_argument("--calibrate", type=Path, required=True, help="WikiText-2 validation text")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--methods", nargs="+", help="names of methods; all by default")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each text")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--work", type=Path, help="keep the conversions here, for a second run")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        records = run(arguments, arguments.work or Path(temporary))
    settings = {"window": WINDOW, "tokens": arguments.tokens, "calibration_tokens": arguments.calibration_tokens}
    seconds = round(time.perf_counter() - started, 1)
    save(
        "start_perplexity",
        {"settings": settings, "seconds": seconds, "records": records},
        table(records, arguments.tokens),
    )
    picture(records)


if __name__ == "__main__":
    main()
