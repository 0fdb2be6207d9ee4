"""`dense`: the dequantized backbone in the model's own dtype. Loads anywhere and saves no memory.

The scales are rounded to the model's dtype before codes are chosen, so that the rounded product has the same absmax:
loading the dense file with bitsandbytes' on-the-fly NF4 (block size 64, no double quantization) gives back the very
same codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_cli.formats.base import (
    ANY_REQUEST,
    FormatDefaults,
    GridRequest,
    OutputTensor,
    QuantizedMatrix,
    Refusal,
    Request,
)
from loftq_cli.formats.packed import PackedFormat
from loftq_cli.numerics.grids import Grid, Quantized, dequantize


class DenseFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    name = "dense"

    def grid(self, request: GridRequest) -> Grid | Refusal:
        return PackedFormat().grid(request)

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        shape = matrix.shape[::-1] if matrix.kind == "conv1d" else matrix.shape
        return (OutputTensor(matrix.tensor, matrix.grid.value_dtype, shape),)

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        dense = dequantize(quantized, matrix.grid).to(matrix.grid.value_dtype)
        return {matrix.tensor: dense.T.contiguous() if matrix.kind == "conv1d" else dense}

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        dense = read(matrix.tensor).float()
        return dense.T.contiguous() if matrix.kind == "conv1d" else dense

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> None:
        return None
