"""`packed`: true 2-, 3-, 4- and 8-bit storage of any codebook, read by `loftq_cli.runtime`.

For a linear layer at on-disk path P:

| tensor | dtype | shape |
|---|---|---|
| `P.weight` | uint8 | [out, ceil(in * bits / 8)], each row a bit stream of codes, least significant bit first |
| `P.weight_absmax` | the scale dtype | [out, ceil(in / block_size)]; may be negative |
| `P.weight_levels` | float32 | [2**bits], only where each matrix has levels of its own (`fitted`) |

A tensor X that stacks the matrices of all experts keeps its name; its codes are [experts, out, ...] whatever the order
of the source, and its scales are `X.absmax`. Experts, and what else PEFT adapts as a parameter and not as a module, are
dequantized when they are loaded: `parameters` in config.json, with the width of their rows, and whether the
checkpoint's own order is [..., in, out].

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
    holds_experts = True

    def grid(self, request: GridRequest) -> BlockGrid:
        book = codebook(request.data_type, request.bits)
        dtype = request.dtype
        return BlockGrid(book, request.block_size, "rows", scale_dtype=dtype, value_dtype=dtype, signed=True)

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        n_out, n_in = matrix.shape
        bits, blocks_per_row = matrix.grid.codebook.bits, matrix.grid.n_blocks(1, n_in)
        stacked = matrix.expert is not None and matrix.expert.stacked
        codes, absmax = (
            (matrix.tensor, f"{matrix.tensor}.absmax")
            if stacked
            else (f"{matrix.prefix}.weight", f"{matrix.prefix}.weight_absmax")
        )
        stored = (
            matrix.stored(codes, torch.uint8, (n_out, packed_width(n_in, bits))),
            matrix.stored(absmax, matrix.grid.scale_dtype, (n_out, blocks_per_row)),
        )
        if not matrix.grid.codebook.fitted:
            return stored
        return (*stored, OutputTensor(f"{matrix.prefix}.weight_levels", torch.float32, (2**bits,)))

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
        # In the order of the model; all experts of a parameter share a grid and are named once.
        groups: dict[BlockGrid, tuple[list[str], dict[str, dict[str, Any]]]] = {}
        for matrix in matrices:
            modules, parameters = groups.setdefault(matrix.grid, ([], {}))
            if matrix.parameter:
                transposed = matrix.expert is not None and matrix.expert.transposed
                parameters[matrix.parameter] = {"in_features": matrix.in_features, "transposed": transposed}
            else:
                modules.append(matrix.module)
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
                    "parameters": parameters,
                }
                for grid, (modules, parameters) in groups.items()
            ],
        }
