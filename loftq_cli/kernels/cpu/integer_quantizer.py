"""The compiled quantizer of integer groups on the CPU, on as many threads as torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from loftq_cli.kernels.cpu import integers as kernel
from loftq_cli.kernels.cpu.block_quantizer import _KINDS, _share
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, dequantize
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank
from loftq_cli.numerics.quantizers.integer import REFITS, shares
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, Scratch

_ROWS = 16  # rows in a chunk of work
_ZEROS = {"none": kernel.ZERO_NONE, "integer": kernel.ZERO_INTEGER, "float": kernel.ZERO_FLOAT}
_RULES = {"absmax": kernel.RULE_ABSMAX, "minmax": kernel.RULE_MINMAX, "mse": kernel.RULE_MSE}


@dataclass(frozen=True)
class CompiledAffineQuantizer:
    """`numerics.quantizers.integer.AffineQuantizer`, bit for bit, in one pass over memory.

    Takes finite float32 matrices on the CPU.
    """

    grid: AffineGrid

    def quantize_residual(self, weight: Tensor, target: Tensor) -> QuantizeStep:
        """Quantize `target` to Q by the grid's rule and compute W - Q. Both arguments float32 [out, in]."""
        return self._quantize(weight, target, _RULES[self.grid.scale_rule])

    def quantize_fitted(self, weight: Tensor, target: Tensor, *, previous: QuantizeStep | None = None) -> QuantizeStep:
        """Do what `AffineQuantizer.quantize_fitted` does."""
        if previous is None:
            return self._quantize(weight, target, kernel.RULE_MSE)
        assert isinstance(previous.quantized, QuantizedGroups)
        return self._quantize(weight, target, kernel.RULE_REFINE, start=previous.quantized)

    def quantize_corrected(
        self, weight: Tensor, found: LowRank | None, *, half: bool = False, scratch: Scratch | None = None
    ) -> QuantizeStep:
        """Quantize W - BA by the grid's rule and compute W - Q, which is bfloat16 with `half`."""
        reuses = scratch is not None and scratch.residual.dtype == torch.float32
        residual = scratch.residual if scratch and reuses else torch.empty_like(weight)
        rule, codes = _RULES[self.grid.scale_rule], None if scratch is None else scratch.codes
        if found is None:
            step = self._quantize(weight, weight, rule, residual=residual, codes=codes)
        else:
            # The kernel reads each group of BA before it overwrites it.
            product = found.product(torch.float32, out=residual)
            step = self._quantize(weight, product, rule, residual=residual, corrects=True, codes=codes)
        return replace(step, residual=step.residual.to(torch.bfloat16)) if half else step

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
        codes: Tensor | None = None,
    ) -> QuantizeStep:
        grid, (n_out, n_in) = self.grid, weight.shape
        residual = torch.empty_like(weight, memory_format=torch.contiguous_format) if residual is None else residual
        codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
        scales = torch.empty(n_out, grid.n_blocks(1, n_in)) if start is None else start.scales.clone()
        zeros = None if grid.zero == "none" else torch.empty_like(scales)
        if start is not None and start.zeros is not None:
            zeros = start.zeros.clone()
        sums = np.zeros(n_out)
        arrays = kernel.Arrays(
            weight=weight.contiguous().numpy(),
            product=product.contiguous().numpy(),
            codes=codes.contiguous().numpy(),
            scales=scales.contiguous().numpy(),
            zeros=np.empty((0, 0), np.float32) if zeros is None else zeros.numpy(),
            residual=residual.numpy(),
            sums=sums,
            shares=np.array(shares(grid), np.float32),
        )
        settings = kernel.Settings(
            width=grid.width(n_in),
            top=np.float32(grid.top),
            zero=_ZEROS[grid.zero],
            least_zero=np.float32(grid.least_zero),
            rule=rule,
            refits=REFITS,
            scale_kind=_KINDS[grid.scale_dtype],
            offset_kind=_KINDS[grid.zero_dtype],
            product_kind=_KINDS[grid.product_dtype],
            value_kind=_KINDS[grid.value_dtype],
            corrects=corrects,
        )

        def work(first: int, last: int) -> None:
            kernel.quantize_rows(arrays, settings, first * _ROWS, min(last * _ROWS, n_out))

        _share(work, -(-n_out // _ROWS))
        return QuantizeStep(QuantizedGroups(codes, scales, zeros), residual, math.sqrt(sums.sum()))
