"""A small trained Llama that ships with the tests, and the book it was trained on.

`tests/data/alice` holds "Alice's Adventures in Wonderland" by Lewis Carroll (1865, in the public domain; Project
Gutenberg's text, one paragraph per line) and `llama`, a checkpoint trained on its first ten chapters: six layers of
width 128, bfloat16, five shards, byte-level BPE. It is stored, not trained by the suite, because trained weights differ
in their last bits from machine to machine and tests compare measured numbers.

To train it again (700 steps, some minutes on one core): python tests/support/trained_llama.py FOLDER
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALICE: Final = Path(__file__).resolve().parents[1] / "data" / "alice"
CHECKPOINT: Final = ALICE / "llama"
WIDTH: Final = 128
VOCABULARY: Final = 512
END: Final = "<|endoftext|>"

_STEPS, _ROWS, _TOKENS = 700, 8, 128
_PEAK_RATE, _DECAY, _DROPPED_MERGES = 4e-3, 0.1, 0.1


def training_text() -> str:
    """Return chapters one to ten."""
    return _book()[0]


def held_out_text() -> str:
    """Return chapters eleven and twelve, on which the checkpoint was not trained."""
    return _book()[1]


def _book() -> tuple[str, str]:
    seen, mark, unseen = (ALICE / "alice.txt").read_text(encoding="utf-8").partition("CHAPTER XI\n")
    return seen, mark + unseen


def make(folder: Path) -> None:
    """Train tokenizer and model, and write both into `folder`."""
    tokenizer = _tokenizer()
    model = _model()
    _train(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="500KB")
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text().splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """AdamW with a cosine schedule; BPE dropout augments the short text."""
    unseen = torch.tensor(tokenizer(held_out_text())["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.95), weight_decay=_DECAY)
    generator = torch.Generator().manual_seed(1)
    for step in range(_STEPS):
        if step % 20 == 0:
            tokenizer.backend_tokenizer.model.dropout = _DROPPED_MERGES
            ids = torch.tensor(tokenizer(training_text())["input_ids"])
            tokenizer.backend_tokenizer.model.dropout = None
        rate = _PEAK_RATE * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * step / _STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - _TOKENS, (_ROWS, 1), generator=generator)
        rows = ids[starts + torch.arange(_TOKENS)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            held_out = _loss(model, unseen[: 8 * _TOKENS])
            print(f"step {step + 1}: loss {loss.item():.3f}, held out {held_out:.3f}", flush=True)


@torch.no_grad()
def _loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    rows = ids[: len(ids) // _TOKENS * _TOKENS].view(-1, _TOKENS)
    return float(model(input_ids=rows, labels=rows).loss)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
