"""Double quantization: block scales as 8-bit dynamic floats, with the arithmetic of bitsandbytes.

See QLoRA (arXiv 2305.14314), section 3, and `create_dynamic_map` and `quantize_blockwise` in bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NESTED_BLOCK = 256  # scales that share a second-level scale


@dataclass(frozen=True)
class NestedScales:
    """Codes uint8 [n]; `absmax` float32 [ceil(n / 256)] of each 256 centred scales; `offset` float32 [], their mean."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def dequantized(self) -> Tensor:
        """Return the scales, float32 [n], as bitsandbytes computes them."""
        levels = torch.tensor(dynamic_map(), dtype=torch.float32, device=self.codes.device)
        second = self.absmax.repeat_interleave(NESTED_BLOCK)[: self.codes.numel()]
        return levels[self.codes.int()] * second + self.offset


def quantize_scales(scales: Tensor) -> NestedScales:
    """Subtract the mean, divide by the largest magnitude of each 256, round to the nearest level; ties go to the lower.

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
    """Return the 256 levels of a signed 8-bit number with an exponent of up to seven bits: -0.993 … 1."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        for mean in (10.0 ** (exponent - 6) * means).tolist():
            levels += [mean, -mean]
    return tuple(sorted(levels))
