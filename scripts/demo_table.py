"""The summary at the end of the demo: sizes, residuals, similarity of the embeddings, and how to load the result."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import loftq_cli
from loftq_cli.machine.sizes import size_text

SENTENCES = (
    "The converter reads a checkpoint matrix by matrix.",
    "A laptop can quantize a model that does not fit into its memory.",
    "Where does the nearest train station lie?",
    "Low-rank adapters start training where the full-precision model stood.",
)


def embed(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    """Mean-pooled sentence embeddings, [sentences, hidden]."""
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def silence_libraries() -> None:
    """Keep the progress bars and hints of libraries out of the output."""
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main(source: str, outputs: list[str]) -> None:
    silence_libraries()
    tokenizer = AutoTokenizer.from_pretrained(source)
    reference = embed(AutoModel.from_pretrained(source).eval(), tokenizer)
    table = Table(title="all-MiniLM-L6-v2, rank 16", title_justify="left")
    for column in ("", "format", "bits stored", "source", "backbone", "adapter", "plain", "start", "cosine to source"):
        table.add_column(column, justify="left" if column in ("", "format") else "right", no_wrap=True)
    for output in outputs:
        manifest = loftq_cli.read_manifest(output)
        model = loftq_cli.load(output).eval()
        cosine = torch.nn.functional.cosine_similarity(embed(model, tokenizer), reference).mean()
        totals = manifest.totals
        table.add_row(
            Path(output).name,
            manifest.format,
            f"{totals.bits_stored:.2f}",
            size_text(totals.source_bytes),
            size_text(totals.backbone_bytes),
            size_text(totals.adapter_bytes),
            f"{totals.plain_residual:.4f}",
            f"{totals.residual:.4f}",
            f"{cosine:.4f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("plain: residual of quantization alone; start: with the adapter. Half of a file is the embedding.\n")
    console.print("Load it and train:\n")
    console.print(f"  import loftq_cli\n  model = loftq_cli.load({outputs[-1]!r}, trainable=True)", soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
