"""Double quantization: block scales as 8-bit dynamic floats, in bitsandbytes' own arithmetic (QLoRA, arXiv 2305.14314,
section 3; bitsandbytes `create_dynamic_map` and `quantize_blockwise`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NESTED_BLOCK = 256  # scales that share a second-level scale


@dataclass(frozen=True)
class NestedScales:
    """Codes uint8 [n], the largest magnitude float32 of every 256 centred scales, and their mean float32 []."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def dequantized(self) -> Tensor:
        """float32 [n], as bitsandbytes computes it."""
        levels = torch.tensor(dynamic_map(), dtype=torch.float32, device=self.codes.device)
        second = self.absmax.repeat_interleave(NESTED_BLOCK)[: self.codes.numel()]
        return levels[self.codes.int()] * second + self.offset


def quantize_scales(scales: Tensor) -> NestedScales:
    """Subtract the mean, scale by the largest of 256, take the nearest level; a tie takes the lower one.

    Args:
        scales: float32 [n].
    """
    offset = scales.mean()
    centred = F.pad(scales - offset, (0, -scales.numel() % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = centred.abs().amax(dim=1)
    levels = torch.tensor(dynamic_map(), dtype=torch.float32, device=scales.device)
    scaled = centred * absmax.clamp(min=1e-38).reciprocal().unsqueeze(1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return NestedScales(codes.reshape(-1)[: scales.numel()], absmax, offset)


@cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 levels of a signed 8-bit number with an exponent of up to seven bits: -0.993 … 1."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        for mean in (10.0 ** (exponent - 6) * means).tolist():
            levels += [mean, -mean]
    return tuple(sorted(levels))
