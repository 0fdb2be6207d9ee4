"""Merge a trained adapter into its backbone, and compare perplexities before and after.

    python examples/trainer.py --text train.txt
    python examples/merge_and_eval.py --text test.txt

The merged model loads with transformers alone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq_cli


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int], window: int) -> float:
    """Return exp of the mean loss of the next token, over windows that do not overlap."""
    rows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    losses = [model(input_ids=row, labels=row).loss for row in torch.tensor(rows).split(1)]
    return math.exp(torch.stack(losses).mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converted", type=Path, default=Path("trainer-output/converted"))
    parser.add_argument("--adapter", type=Path, default=Path("trainer-output/trained"))
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file to measure on")
    parser.add_argument("--output", type=Path, default=Path("merged"))
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-tokens", type=int, default=20_000)
    args = parser.parse_args()

    # Before training: the source, its plain quantization, the backbone alone, and the backbone with its adapter.
    limits = {"max_tokens": args.max_tokens, "window": args.window}
    for score in loftq_cli.evaluate(args.converted, args.text, **limits).scores:
        print(f"{score.model:>16}: {score.perplexity:.3f}")

    # float32 keeps every digit; the default is the model's own dtype. `to="requantize"` keeps the bits instead.
    report = loftq_cli.merge(args.converted, args.adapter, output=args.output, dtype="float32", overwrite=True)
    print(f"{len(report.errors)} matrices merged; largest relative error: {report.worst_error:.1e}")

    tokenizer = AutoTokenizer.from_pretrained(args.output)
    ids = tokenizer(args.text.read_text(encoding="utf-8")).input_ids[: args.max_tokens]
    trained = loftq_cli.load(args.converted, adapter=args.adapter, dtype=torch.float32).eval()
    print(f"{'trained adapter':>16}: {perplexity(trained, ids, args.window):.3f}")
    merged = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    print(f"{'merged model':>16}: {perplexity(merged, ids, args.window):.3f}")


if __name__ == "__main__":
    main()
