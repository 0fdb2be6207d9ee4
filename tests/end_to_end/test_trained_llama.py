"""The checkpoint that ships with the tests is a trained one: claims about trained weights may lean on it."""

from __future__ import annotations

import torch
from support.loading import source_weights
from support.perplexity import plain_perplexity
from support.trained_llama import ALICE, CHECKPOINT, VOCABULARY, held_out_text, training_text
from torch import Tensor


def test_it_reads_chapters_it_has_not_seen() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen, unseen = training_text(), held_out_text()
    assert unseen.startswith("CHAPTER XI\n") and len(unseen) > 20_000 and unseen[:5_000] not in seen
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)(unseen[:5_000])["input_ids"]
    model, info = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert plain_perplexity(model, ids) < VOCABULARY / 10


def test_its_matrices_lean_on_few_directions() -> None:
    """Training raises the leading singular values above those of a random matrix of the same shape."""
    shape = (128, 128)
    random = leading(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    attention = [w for name, w in source_weights(CHECKPOINT).items() if "self_attn" in name]
    assert len(attention) == 24 and {(w.shape, w.dtype) for w in attention} == {(shape, torch.bfloat16)}
    shares = [leading(w.float()) for w in attention]
    assert min(shares) > 1.15 * random and sum(shares) / len(shares) > 1.9 * random


def leading(w: Tensor) -> float:
    """Share of the squared norm in the first 16 directions."""
    energy = torch.linalg.svdvals(w).square()
    return float(energy[:16].sum() / energy.sum())


def test_it_is_small_and_sharded() -> None:
    assert len(list(CHECKPOINT.glob("model-*.safetensors"))) > 2
    assert sum(path.stat().st_size for path in ALICE.rglob("*") if path.is_file()) < 3_000_000
