"""KL to full precision and perplexity of a decoder at the start of training: LDLQ beside the methods without data.

    python scripts/study/ldlq.py NAME --model MODEL --test WIKITEXT_TEST --calibrate WIKITEXT_VALID --cases 2:4 2:16

Texts: WikiText-2's test text and the Python language reference that the interpreter ships. Calibration sees only
WikiText-2's validation text, so the second text shows what it does to another domain. Everything is computed in
float32. Writes results/NAME.{json,md}; cases that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from study import METHODS, RESULTS, Method, converted, markdown, put_weights, python_reference, save
from torch import Tensor

TEXTS = {"wikitext": "WikiText-2 test", "domain": "Python reference"}
EXTRA = (
    Method("refined, trellis", {"method": "refined", "levels": "trellis"}),
    Method("LDLQ, trellis", {"method": "ldlq", "levels": "trellis", "iters": 6}, "full"),
    Method("LDLQ", {"method": "ldlq", "iters": 6}, "full"),
    Method("LDLQ, fitted levels", {"method": "ldlq", "levels": "fitted", "iters": 6}, "full"),
    Method(
        "LDLQ, fitted levels, from zero", {"method": "ldlq", "levels": "fitted", "init": "zero", "iters": 6}, "full"
    ),
)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, batch: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield groups of windows with the log-probabilities of every next token."""
    for ids in batch.split(rows):
        yield ids, torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)


def measure(model: torch.nn.Module, batch: Tensor, reference: Path, rows: int) -> dict[str, float]:
    """Perplexity, and mean KL(full precision ‖ model) per token; the first call stores full precision's answers."""
    loss = divergence = count = 0.0
    for index, (ids, found) in enumerate(log_probabilities(model, batch, rows)):
        file = reference.with_name(f"{reference.name}-{index}.pt")
        if not file.exists():
            torch.save(found.to(torch.bfloat16) if found.numel() > 1 << 26 else found, file)
        expected = torch.log_softmax(torch.load(file).float(), -1)
        divergence += float((expected.exp() * (expected - found)).sum())
        loss -= float(found.gather(-1, ids[:, 1:, None]).sum())
        count += ids[:, 1:].numel()
    return {"kl": round(divergence / count, 5), "perplexity": round(math.exp(min(loss / count, 700)), 4)}


def windows(arguments: argparse.Namespace, text: str) -> Tensor:
    """Return the first windows of a text, each with the beginning-of-sequence token if asked."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    body = arguments.window - arguments.bos
    ids = tokenizer(text[: 20 * arguments.window * arguments.windows], add_special_tokens=False, verbose=False)
    rows = torch.tensor(ids["input_ids"][: body * arguments.windows]).reshape(-1, body)
    first = torch.full((len(rows), 1), tokenizer.bos_token_id or 0)
    return torch.cat([first, rows], dim=1) if arguments.bos else rows


def one(
    arguments: argparse.Namespace,
    model: torch.nn.Module,
    texts: dict[str, Tensor],
    method: Method,
    bits: int,
    rank: int,
) -> dict[str, Any]:
    path, manifest = converted(
        arguments.work, arguments.model, method, bits, rank, arguments.calibrate, arguments.calibration_tokens
    )
    put_weights(model, path, manifest)
    weighted = [record.weighted_residual for record in manifest.matrices if record.weighted_residual is not None]
    return {
        "method": method.name,
        "bits": bits,
        "rank": rank,
        **{name: measure(model, batch, arguments.work / name, arguments.rows) for name, batch in texts.items()},
        "residual": manifest.totals.residual,
        "weighted_residual": round(sum(weighted) / len(weighted), 6) if weighted else None,
        "bits_stored": manifest.totals.bits_stored,
        "seconds": manifest.totals.seconds,
    }


def table(records: list[dict[str, Any]], names: list[str]) -> str:
    header = ["bits, rank", "method"]
    for name in names:
        header += [f"KL, {TEXTS[name]}", f"perplexity, {TEXTS[name]}"]
    rows = []
    for record in records:
        numbers = [f"{record[name][key]:.4g}" for name in names for key in ("kl", "perplexity")]
        rows.append([f"{record['bits']}, {record['rank']}", record["method"], *numbers])
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the files with the results")
    parser.add_argument("--model", type=Path, required=True, help="directory of a decoder with its tokenizer")
    parser.add_argument("--test", type=Path, required=True, help="WikiText-2 test text")
    parser.add_argument("--calibrate", type=Path, required=True, help="WikiText-2 validation text")
    parser.add_argument("--cases", nargs="+", default=["2:4", "2:16"], help="bits:rank")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="windows that run together")
    parser.add_argument("--bos", action="store_true", help="begin every window with the beginning-of-sequence token")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--work", type=Path, required=True, help="keep conversions and full precision's answers here")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    arguments.work.mkdir(parents=True, exist_ok=True)
    raw = {"wikitext": arguments.test.read_text(encoding="utf-8"), "domain": python_reference()}
    texts = {name: windows(arguments, raw[name]) for name in arguments.texts}
    file = RESULTS / f"{arguments.name}.json"
    records = json.loads(file.read_text())["records"] if file.exists() else []
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if not records:
        full = {name: measure(model, batch, arguments.work / name, arguments.rows) for name, batch in texts.items()}
        records.append({"method": "full precision", "bits": 16, "rank": 0, **full})
    known = {(record["method"], record["bits"], record["rank"]) for record in records}
    settings = {name: getattr(arguments, name) for name in ("window", "windows", "bos", "calibration_tokens")}
    methods = {method.name: method for method in (*METHODS, *EXTRA)}
    for case in arguments.cases:
        bits, rank = map(int, case.split(":"))
        for name in arguments.methods:
            if (name, bits, rank) in known:
                continue
            started = time.perf_counter()
            records.append(one(arguments, model, texts, methods[name], bits, rank))
            print(records[-1], round(time.perf_counter() - started), flush=True)
            save(arguments.name, {"settings": settings, "records": records}, table(records, arguments.texts))


if __name__ == "__main__":
    main()
