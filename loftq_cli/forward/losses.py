"""Sums over the scored positions of a batch: negative log-likelihood, and divergence from another model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of positions that are not scored
_CHUNK_BYTES = 16 << 20  # logits whose probabilities are in memory at once


def summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the summed negative log-likelihood in nats.

    Args:
        logits: [positions, vocabulary]; labels: [positions], IGNORED where nothing is to be predicted.
    """
    losses = F.cross_entropy(logits.float(), labels.to(logits.device), ignore_index=IGNORED, reduction="none")
    return float(losses.sum(dtype=torch.float64))


def summed_divergence(reference: Tensor, logits: Tensor, labels: Tensor) -> float:
    """Return the summed Kullback-Leibler divergence KL(p ‖ q) = Σ p (log p − log q) in nats of the scored positions.

    Args:
        reference: logits [positions, vocabulary] of p; logits: of q; labels: as in `summed_loss`.
    """
    rows = (labels != IGNORED).nonzero().squeeze(1).to(logits.device)
    size = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    total = 0.0
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        log_p, log_q = (x[some].float().log_softmax(-1) for x in (reference, logits))
        terms = log_p.exp() * (log_p - log_q)
        # An impossible token contributes nothing, also where both models exclude it by minus infinity.
        total += float(terms.masked_fill_(log_p.isneginf(), 0.0).sum(dtype=torch.float64))
    return total
