"""A text and a model to calibrate on it."""

from __future__ import annotations

from pathlib import Path

from support.family_checkpoints import saved
from support.perplexity import write_tokenizer

TEXT = " ".join(f"w{(i * i + 3 * i) % 91}" for i in range(300))


def llama(folder: Path) -> Path:
    """Save a random Llama with a tokenizer, and return its folder."""
    saved("llama").model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
