"""The adapter start that changes nothing: PEFT's own default."""

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


def zero_start(out_features: int, in_features: int, rank: int, *, generator: torch.Generator) -> Factors:
    """A Kaiming-uniform with a = sqrt(5), B zero (QLoRA, arXiv 2305.14314; PEFT's `reset_lora_parameters`)."""
    bound = 1 / math.sqrt(in_features)
    lora_a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
    return Factors(lora_a, torch.zeros(out_features, rank))
