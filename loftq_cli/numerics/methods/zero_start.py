"""The adapter start that leaves the model unchanged: PEFT's default."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """lora_a [r, in] and lora_b [out, r], float32."""

    lora_a: Tensor
    lora_b: Tensor


def zero_start(
    out_features: int, in_features: int, rank: int, *, generator: torch.Generator, group: int = 1
) -> Factors:
    """Return A Kaiming-uniform with a = sqrt(5) and B zero (QLoRA, arXiv 2305.14314; PEFT's `reset_lora_parameters`).

    Args:
        group: number of inputs that are pooled; A is drawn for in / group inputs and repeated within groups.
    """
    width = in_features // group
    bound = 1 / math.sqrt(width)
    lora_a = (torch.rand(rank, width, generator=generator) * 2 - 1) * bound
    lora_a = lora_a if group == 1 else lora_a.repeat_interleave(group, dim=1)
    return Factors(lora_a, torch.zeros(out_features, rank))
