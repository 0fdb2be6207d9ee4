"""Random matrices in packed storage."""

from __future__ import annotations

import torch

from loftq_cli.formats import get_format
from loftq_cli.formats.base import GridRequest, QuantizedMatrix
from loftq_cli.kernels import block_quantizer


def encoded(
    shape: tuple[int, int],
    bits: int,
    dtype: torch.dtype,
    kind: str = "linear",
    block_size: int = 32,
    levels: str = "nf",
):
    """Return a random matrix in packed storage: grid, codes, scales, and Q as the format decodes it."""
    packed = get_format("packed")
    grid = packed.grid(GridRequest(kind, *shape, bits, levels, block_size, dtype))
    matrix = QuantizedMatrix("m.weight", "m", kind, *shape, grid)
    weight = torch.randn(shape)
    step = block_quantizer(grid, "cpu").quantize_residual(weight, weight)
    tensors = packed.encode(matrix, step.quantized)
    return grid, tensors["m.weight"], tensors["m.weight_absmax"], packed.decode(matrix, tensors.__getitem__).to(dtype)
