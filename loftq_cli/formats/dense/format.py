"""`dense`: the dequantized backbone in the model's own dtype. It loads anywhere and saves no memory.

The scales are rounded to the model's dtype before codes are chosen, so that the rounded product has the same absmax:
loading the dense file with bitsandbytes' on-the-fly NF4 (block size 64, no double quantization) reproduces exactly the
same codes and scales. If scales are fitted (`refined`), this holds for blocks that use a level of -1 or 1: all of them
at 2 bits, all but about 0.1 % at 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.formats.base import ANY_REQUEST, FormatDefaults, GridRequest, QuantizedMatrix, Refusal, Request
from loftq_cli.formats.packed.format import PackedFormat
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize
from loftq_cli.tensorfile.tensors import OutputTensor


class DenseFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    name = "dense"
    holds_experts = True
    holds_stacked_experts = True

    def grid(self, request: GridRequest) -> Grid | Refusal:
        if request.data_type == "fitted":
            return Refusal("only packed files can store --levels fitted: use --format packed", fatal=True)
        found = PackedFormat().grid(replace(request, parameter=False))
        return replace(found, signed=False) if isinstance(found, BlockGrid) else found

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        shape = matrix.orientation.turn_shape(matrix.shape)
        return (matrix.stored(matrix.tensor, matrix.grid.value_dtype, shape),)

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        dense = dequantize(quantized, matrix.grid).to(matrix.grid.value_dtype)
        (weight,) = self.tensors(matrix)
        return {weight.name: matrix.orientation.turn(dense).contiguous()}

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        (weight,) = self.tensors(matrix)
        dense = read(weight.name).float()
        return matrix.orientation.turn(dense).contiguous()

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> None:
        return None
