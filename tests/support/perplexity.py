"""An independent perplexity loop on transformers and PEFT."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import typer.testing

WINDOW, TOKENS = 96, 1000


runner = typer.testing.CliRunner()


def plain_perplexity(model: torch.nn.Module, ids: list[int]) -> float:
    """Return the perplexity by the textbook loop, with transformers' forward and loss, one window at a time."""
    total = count = 0.0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        with torch.no_grad():
            total += float(model(input_ids=window, labels=window).loss) * (WINDOW - 1)
        count += WINDOW - 1
    return math.exp(total / count)


def write_tokenizer(folder: Path, *, mask: bool = True) -> None:
    """Write a word tokenizer for the 96 ids of the random families."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(91))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    named = {"mask_token": "[MASK]"} if mask else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", **named
    ).save_pretrained(folder)
