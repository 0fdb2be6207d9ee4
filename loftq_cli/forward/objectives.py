"""Evaluation objectives: predict the next token, masked tokens or the second half, or compare hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.forward.losses import IGNORED
from loftq_cli.forward.streamed import Batch
from loftq_cli.forward.text import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MASKED_SHARE = 0.15  # BERT, arXiv 1810.04805


@dataclass(frozen=True)
class Objective:
    """The inputs of all windows and their targets.

    Attributes:
        metric: `perplexity`, `masked loss`, `sequence loss` or `representation error`.
        labels: [windows, tokens], IGNORED at positions that are not scored; None if hidden states are compared.
    """

    metric: str
    batch: Batch
    labels: Tensor | None

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return self.batch["input_ids"].numel() if self.labels is None else int((self.labels != IGNORED).sum())

    def rows(self, rows: slice) -> Objective:
        """Return the same objective for some of the windows."""
        labels = None if self.labels is None else self.labels[rows]
        return Objective(self.metric, {name: ids[rows] for name, ids in self.batch.items()}, labels)


def choose_objective(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows) -> Objective:
    """Return the objective for a model's class. Masked positions are the same on every call.

    Raises:
        LoftqError: the tokenizer has no mask token, which a masked language model needs.
    """
    if model.config.is_encoder_decoder:
        return _second_half(model, windows)
    name = type(model).__name__
    if name in _class_names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        return _next_token(windows)
    if name in _class_names("MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        return _masked(tokenizer, windows)
    return Objective("representation error", {"input_ids": windows.ids}, None)


def model_inputs(model: PreTrainedModel, windows: Windows) -> Batch:
    """Return the windows as a model's inputs, without targets."""
    return _second_half(model, windows).batch if model.config.is_encoder_decoder else {"input_ids": windows.ids}


def _class_names(*tables: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for table in tables:
        for names in getattr(modeling_auto, table, {}).values():
            found.update({names} if isinstance(names, str) else names)
    return found


def _next_token(windows: Windows) -> Objective:
    """Predict every token but a window's first from the preceding ones."""
    labels = torch.full_like(windows.ids, IGNORED)
    labels[:, :-1] = windows.ids[:, 1:]
    return Objective("perplexity", {"input_ids": windows.ids}, labels)


def _masked(tokenizer: PreTrainedTokenizerBase, windows: Windows) -> Objective:
    """Predict 15 % of the text's tokens, all of them replaced by the mask token."""
    if tokenizer.mask_token_id is None:
        raise LoftqError("the tokenizer has no mask token, so a masked language model cannot be scored: add one.")
    ids, labels = windows.ids.clone(), torch.full_like(windows.ids, IGNORED)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < _MASKED_SHARE
    chosen[:, : windows.before] = False
    chosen[:, ids.shape[1] - windows.after :] = False
    labels[chosen] = ids[chosen]
    ids[chosen] = tokenizer.mask_token_id
    return Objective("masked loss", {"input_ids": ids}, labels)


def _second_half(model: PreTrainedModel, windows: Windows) -> Objective:
    """Predict the second half of every window with the decoder, which receives the true preceding tokens."""
    ids, end = windows.ids, windows.length - windows.after
    middle = windows.before + (end - windows.before) // 2
    encoder = torch.cat([ids[:, :middle], ids[:, end:]], dim=1)
    labels = ids[:, middle:]
    known = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = torch.full((len(ids), 1), next((i for i in known if i is not None), 0), dtype=torch.long)
    decoder = torch.cat([start, labels[:, :-1]], dim=1)
    return Objective("sequence loss", {"input_ids": encoder, "decoder_input_ids": decoder}, labels)
