"""`packed`: true 2-, 3-, 4- and 8-bit storage of any codebook, read by `loftq_cli.runtime`.

For a linear layer at on-disk path P:

| tensor | dtype | shape |
|---|---|---|
| `P.weight` | uint8 | [out, ceil(in * bits / 8)], each row a bit stream of codes, least significant bit first |
| `P.weight_absmax` | the scale dtype | [out, ceil(in / block_size)]; may be negative |
| `P.weight_levels` | float32 | [2**bits], only where each matrix has levels of its own (`fitted`) |

Q = round(level[code] * absmax) with the product in float32 and one rounding to the model's dtype. Levels, bits, block
size and module paths stand in config.json; JSON's shortest decimals give float32 back exactly. `fitted` levels are
tensors instead, since everything in config.json is known before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq_cli.formats.base import DTYPE_NAMES, GridRequest, OutputTensor, QuantizedMatrix
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks, dequantize
from loftq_cli.numerics.codebooks import codebook
from loftq_cli.numerics.packing import pack_rows, packed_width, unpack_rows

QUANT_METHOD = "loftq"
CONFIG_VERSION = 2  # 1 without levels of the matrices' own


class PackedFormat:
    """See the module's docstring; implements `formats.base.Format`."""

    name = "packed"

    def grid(self, request: GridRequest) -> BlockGrid:
        book = codebook(request.data_type, request.bits)
        dtype = request.dtype
        return BlockGrid(book, request.block_size, "rows", scale_dtype=dtype, value_dtype=dtype, signed=True)

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        n_out, n_in = matrix.shape
        bits, blocks_per_row = matrix.grid.codebook.bits, matrix.grid.n_blocks(1, n_in)
        codes = OutputTensor(f"{matrix.prefix}.weight", torch.uint8, (n_out, packed_width(n_in, bits)))
        absmax = OutputTensor(f"{matrix.prefix}.weight_absmax", matrix.grid.scale_dtype, (n_out, blocks_per_row))
        if not matrix.grid.codebook.fitted:
            return codes, absmax
        return codes, absmax, OutputTensor(f"{matrix.prefix}.weight_levels", torch.float32, (2**bits,))

    def encode(self, matrix: QuantizedMatrix, quantized: QuantizedBlocks) -> dict[str, Tensor]:
        weight, absmax, *levels = self.tensors(matrix)
        own = matrix.grid.levels() if quantized.levels is None else quantized.levels
        return {
            weight.name: pack_rows(quantized.codes, matrix.grid.codebook.bits),
            absmax.name: quantized.absmax.to(absmax.dtype).reshape(absmax.shape),
            **{tensor.name: own for tensor in levels},
        }

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        weight, absmax, *levels = self.tensors(matrix)
        codes = unpack_rows(read(weight.name), matrix.grid.codebook.bits, matrix.in_features)
        own = read(levels[0].name) if levels else None
        return dequantize(QuantizedBlocks(codes, read(absmax.name).float().reshape(-1), own), matrix.grid)

    def quantization_config(
        self, matrices: Sequence[QuantizedMatrix], dense_linears: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        groups: dict[BlockGrid, list[str]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.grid, []).append(matrix.module)
        return {
            "quant_method": QUANT_METHOD,
            "version": CONFIG_VERSION if any(grid.codebook.fitted for grid in groups) else 1,
            "dtype": DTYPE_NAMES[dtype],
            "groups": [
                {
                    "bits": grid.codebook.bits,
                    "data_type": grid.codebook.data_type,
                    "levels": list(grid.codebook.levels),
                    "block_size": grid.block_size,
                    "scale_dtype": DTYPE_NAMES[grid.scale_dtype],
                    "modules": modules,
                }
                for grid, modules in groups.items()
            ],
        }
