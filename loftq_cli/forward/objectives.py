"""What a model is asked about its windows: the next token, masked tokens, the second half, or its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.forward.streamed import IGNORED, Batch
from loftq_cli.forward.text import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MASKED_SHARE = 0.15  # BERT, arXiv 1810.04805


@dataclass(frozen=True)
class Questions:
    """Inputs of all windows and what they are scored on.

    Attributes:
        metric: `perplexity`, `masked loss`, `sequence loss` or `representation error`.
        labels: [windows, tokens], IGNORED where nothing is scored; None where hidden states are compared.
    """

    metric: str
    batch: Batch
    labels: Tensor | None

    @property
    def scored(self) -> int:
        """Tokens that count."""
        return self.batch["input_ids"].numel() if self.labels is None else int((self.labels != IGNORED).sum())

    def rows(self, rows: slice) -> Questions:
        """Those of some windows."""
        labels = None if self.labels is None else self.labels[rows]
        return Questions(self.metric, {name: ids[rows] for name, ids in self.batch.items()}, labels)


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> Questions:
    """The questions for a model's class; the same ones every time.

    Raises:
        LoftqError: the tokenizer lacks what they need.
    """
    if model.config.is_encoder_decoder:
        return _second_half(model, windows)
    name = type(model).__name__
    if name in _class_names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        return _next_token(windows)
    if name in _class_names("MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        return _masked(tokenizer, windows)
    return Questions("representation error", {"input_ids": windows.ids}, None)


def inputs_of(model: PreTrainedModel, windows: Windows) -> Batch:
    """The windows as a model takes them when nothing is asked."""
    return _second_half(model, windows).batch if model.config.is_encoder_decoder else {"input_ids": windows.ids}


def _class_names(*tables: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for table in tables:
        for names in getattr(modeling_auto, table, {}).values():
            found.update({names} if isinstance(names, str) else names)
    return found


def _next_token(windows: Windows) -> Questions:
    """Every token but a window's first, from the ones before it in the window."""
    labels = torch.full_like(windows.ids, IGNORED)
    labels[:, :-1] = windows.ids[:, 1:]
    return Questions("perplexity", {"input_ids": windows.ids}, labels)


def _masked(tokenizer: PreTrainedTokenizerBase, windows: Windows) -> Questions:
    """15 % of the text's tokens, all replaced by the mask."""
    if tokenizer.mask_token_id is None:
        raise LoftqError("this tokenizer has no mask token, so a masked language model cannot be scored with it.")
    ids, labels = windows.ids.clone(), torch.full_like(windows.ids, IGNORED)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < _MASKED_SHARE
    chosen[:, : windows.before] = False
    chosen[:, ids.shape[1] - windows.after :] = False
    labels[chosen] = ids[chosen]
    ids[chosen] = tokenizer.mask_token_id
    return Questions("masked loss", {"input_ids": ids}, labels)


def _second_half(model: PreTrainedModel, windows: Windows) -> Questions:
    """The decoder's own tokens are the second half of every window, and it is given the right ones so far."""
    ids, end = windows.ids, windows.length - windows.after
    middle = windows.before + (end - windows.before) // 2
    encoder = torch.cat([ids[:, :middle], ids[:, end:]], dim=1)
    labels = ids[:, middle:]
    known = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = torch.full((len(ids), 1), next((i for i in known if i is not None), 0), dtype=torch.long)
    decoder = torch.cat([start, labels[:, :-1]], dim=1)
    return Questions("sequence loss", {"input_ids": encoder, "decoder_input_ids": decoder}, labels)
