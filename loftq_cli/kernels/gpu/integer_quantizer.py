"""The quantizer of integer groups on a GPU, compiled by Triton: the whole search for scales in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from loftq_cli.kernels.gpu import integers as kernel
from loftq_cli.kernels.gpu.block_quantizer import KINDS, bits_of, empty, residual_memory
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, dequantize
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank
from loftq_cli.numerics.quantizers.integer import REFITS, shares
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, Scratch

_COUNT = 16  # groups per program: with eight lanes each, four numbers for each thread of its only warp
_ZEROS: dict[str, int] = {
    "none": kernel.ZERO_NONE.value,
    "integer": kernel.ZERO_INTEGER.value,
    "float": kernel.ZERO_FLOAT.value,
}
_RULES: dict[str, int] = {
    "absmax": kernel.RULE_ABSMAX.value,
    "minmax": kernel.RULE_MINMAX.value,
    "mse": kernel.RULE_MSE.value,
}


@dataclass(frozen=True)
class TritonAffineQuantizer:
    """`numerics.quantizers.integer.AffineQuantizer` in one launch, with the same bits as on a CPU.

    Takes finite float32 matrices on one CUDA or ROCm device.
    """

    grid: AffineGrid

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q by the grid's rule and compute W - Q. Both arguments float32 [out, in]."""
        return self._quantize(weight, target, _RULES[self.grid.scale_rule])

    def quantize_fitted(self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None = None) -> QuantizeStep:
        """Do what `AffineQuantizer.quantize_fitted` does."""
        if previous is None:
            return self._quantize(weight, target, kernel.RULE_MSE.value)
        assert isinstance(previous.quantized, QuantizedGroups)
        return self._quantize(weight, target, kernel.RULE_REFINE.value, start=previous.quantized)

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        """Quantize W - BA by the grid's rule and compute W - Q, which is bfloat16 with `half`."""
        residual = residual_memory(weight, torch.bfloat16 if half else torch.float32, scratch)
        rule = _RULES[self.grid.scale_rule]
        if found is None:
            return self._quantize(weight, weight, rule, residual=residual)
        # BA must not share the residual's memory: unsynchronised threads read a group many times.
        return self._quantize(weight, found.product(torch.float32), rule, residual=residual, corrects=True)

    def restore(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """Return W - Q in float32."""
        assert isinstance(quantized, QuantizedGroups)
        return weight - dequantize(quantized, self.grid)

    def _quantize(
        self,
        weight: Tensor,
        product: Tensor,
        rule: int,
        *,
        start: QuantizedGroups | None = None,
        residual: Tensor | None = None,
        corrects: bool = False,
    ) -> QuantizeStep:
        grid, device, (n_out, n_in) = self.grid, weight.device, weight.shape
        residual = empty(weight, torch.float32) if residual is None else residual
        codes, groups = empty(weight, torch.uint8), grid.n_blocks(1, n_in)
        scales = torch.empty(n_out, groups, device=device) if start is None else start.scales.clone()
        zeros = None if grid.zero == "none" else torch.empty_like(scales)
        if start is not None and start.zeros is not None:
            zeros = start.zeros.clone()
        sums = torch.empty(-(-n_out * groups // _COUNT), dtype=torch.float64, device=device)
        with torch.cuda.device_of(weight):
            kernel.quantize_groups[sums.numel(),](
                weight.contiguous(), product.contiguous(), codes, scales, scales if zeros is None else zeros,
                bits_of(residual), sums, _shares(grid, device),
                n_out * groups, n_in, groups, grid.width(n_in), len(shares(grid)), REFITS,
                float(grid.top), float(grid.least_zero), count=_COUNT, zero=_ZEROS[grid.zero], rule=rule,
                scale_kind=KINDS[grid.scale_dtype], offset_kind=KINDS[grid.zero_dtype],
                product_kind=KINDS[grid.product_dtype], value_kind=KINDS[grid.value_dtype],
                corrects=corrects, halves=residual.dtype == torch.bfloat16, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return QuantizeStep(QuantizedGroups(codes, scales, zeros), residual, math.sqrt(float(sums.sum())))


@cache
def _shares(grid: AffineGrid, device: torch.device) -> Tensor:
    return torch.tensor(shares(grid), dtype=torch.float32, device=device)
