"""`packed`: true 2-, 3-, 4- and 8-bit storage of any codebook and of integers, read by `loftq_cli.runtime`.

For a linear layer at on-disk path P:

| tensor | dtype | shape |
|---|---|---|
| `P.weight` | uint8 | [out, ceil(in * bits / 8)], each row a bit stream of codes, least significant bit first |
| `P.weight_absmax` | the scale dtype | [out, ceil(in / block_size)], codebooks and trellis; may be negative |
| `P.weight_levels` | float32 | [2**bits], only if each matrix has its own levels (`fitted`) |
| `P.weight_scales` | the scale dtype | [out, ceil(in / group_size)], integers only |
| `P.weight_zeros` | float32 | the same, asymmetric integers only: the value of code 0 |

A tensor X that stacks the matrices of all experts keeps its name; its codes are [experts, out, ...] whatever the order
in the source, and its scales are `X.absmax`. Experts, and other weights that PEFT adapts as parameters and not as
modules, are dequantized when they are loaded: `parameters` in config.json has the width of their rows, and whether the
checkpoint's own order is [..., in, out]. They use codebooks without per-matrix levels.
With QA-LoRA, integers are not rounded to the model's dtype (`value_dtype`: float32), so that an adapter can be added to
their zeros.

Codebooks: Q = round(level[code] * absmax). Integers: Q = round((code - 2**(bits - 1)) * scale), or, with zeros,
Q = round(code * scale + zero). Products and sums are computed in float32, with one rounding to the model's dtype.
Trellis (`numerics.grids.trellis`): Q = round(table[state] * absmax), where the state is a window of a tile's codes. The
table belongs to the program; config.json has the number of `state_bits` and of the `table`.
Levels, bits, sizes and module paths are in config.json; JSON's shortest decimals reproduce float32 exactly. `fitted`
levels are tensors instead, because everything in config.json is known before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq_cli.formats.base import (
    ANY_REQUEST,
    DTYPE_NAMES,
    FormatDefaults,
    GridRequest,
    QuantizedMatrix,
    Refusal,
    Request,
    blocks_of,
    groups_of,
)
from loftq_cli.formats.packed import QUANT_METHOD
from loftq_cli.formats.refusals import plain_scales
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, Zero
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks
from loftq_cli.numerics.grids.codebooks import TRELLIS, codebook
from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize
from loftq_cli.numerics.grids.packing import pack_rows, packed_width, unpack_rows
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.numerics.grids.trellis_tables import TABLE_NUMBER
from loftq_cli.tensorfile.tensors import OutputTensor

_NO_TABLE = Refusal(
    "weights that are dequantized while loading can only be packed with a codebook's own levels: use --format dense, "
    "or drop --levels fitted and --data-type int",
    fatal=True,
)


class PackedFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    name = "packed"
    holds_experts = True
    holds_stacked_experts = True

    def grid(self, request: GridRequest) -> Grid | Refusal:
        if refusal := plain_scales(request):
            return refusal
        dtype = request.dtype
        if request.data_type == "int":
            if request.parameter:
                return _NO_TABLE
            zero: Zero = "none" if request.symmetric else "float"
            rule = request.scale_rule
            value_dtype = torch.float32 if request.unrounded else dtype
            return AffineGrid(request.bits, request.block_size, zero, dtype, value_dtype, scale_rule=rule)
        if request.data_type in TRELLIS and request.bits != 8:
            state_bits = TRELLIS[request.data_type]
            return TrellisGrid(request.bits, state_bits, request.block_size, scale_dtype=dtype, value_dtype=dtype)
        book = codebook(request.data_type, request.bits)
        if request.parameter and book.fitted:
            return _NO_TABLE
        return BlockGrid(book, request.block_size, "rows", scale_dtype=dtype, value_dtype=dtype, signed=True)

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        grid, prefix, (n_out, n_in) = matrix.grid, matrix.prefix, matrix.shape
        stacked = matrix.expert is not None and matrix.expert.stacked
        name = matrix.tensor if stacked else f"{prefix}.weight"
        codes = matrix.stored(name, torch.uint8, (n_out, packed_width(n_in, grid.bits)))
        shape = n_out, grid.n_blocks(1, n_in)
        if not isinstance(grid, AffineGrid):
            absmax = matrix.stored(f"{name}{'.' if stacked else '_'}absmax", grid.scale_dtype, shape)
            levels = OutputTensor(f"{prefix}.weight_levels", torch.float32, (2**grid.bits,))
            own = isinstance(grid, BlockGrid) and grid.codebook.fitted
            return (codes, absmax, levels) if own else (codes, absmax)
        scales = OutputTensor(f"{prefix}.weight_scales", grid.scale_dtype, shape)
        if grid.zero == "none":
            return codes, scales
        return codes, scales, OutputTensor(f"{prefix}.weight_zeros", grid.zero_dtype, shape)

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        weight, *others = self.tensors(matrix)
        if not isinstance(matrix.grid, AffineGrid):
            numbers: tuple[Tensor | None, ...] = blocks_of(quantized).absmax, blocks_of(quantized).levels
        else:
            numbers = groups_of(quantized).scales, groups_of(quantized).zeros
        stored = {
            tensor.name: value.to(tensor.dtype).reshape(tensor.shape)
            for tensor, value in zip(others, numbers)
            if value is not None
        }
        return {weight.name: pack_rows(quantized.codes, matrix.grid.bits), **stored}

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        return dequantize(self.unpack(matrix, read), matrix.grid)

    def unpack(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Quantized:
        """Return codes, scales and zeros as they were passed to `encode`."""
        weight, *others = self.tensors(matrix)
        codes = unpack_rows(read(weight.name), matrix.grid.bits, matrix.in_features)
        first, second = [*(read(tensor.name).float() for tensor in others), None][:2]
        assert first is not None
        if not isinstance(matrix.grid, AffineGrid):
            return QuantizedBlocks(codes, first.reshape(-1), second)
        return QuantizedGroups(codes, first, second)

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> dict[str, Any]:
        # In the model's order; all experts of a parameter share a grid and are listed once.
        groups: dict[Grid, tuple[list[str], dict[str, dict[str, Any]]]] = {}
        for matrix in matrices:
            modules, parameters = groups.setdefault(matrix.grid, ([], {}))
            if matrix.parameter:
                transposed = matrix.orientation.transposed
                parameters[matrix.parameter] = {"in_features": matrix.in_features, "transposed": transposed}
            else:
                modules.append(matrix.module)
        return {
            "quant_method": QUANT_METHOD,
            "version": max(map(_version, groups)),
            "dtype": DTYPE_NAMES[dtype],
            "groups": [
                {**_grid_values(grid, dtype), "modules": modules, "parameters": parameters}
                for grid, (modules, parameters) in groups.items()
            ],
        }


def _version(grid: Grid) -> int:
    """Return the lowest version of the config that has this kind of grid."""
    if isinstance(grid, TrellisGrid):
        return 3
    return 2 if isinstance(grid, AffineGrid) or grid.codebook.fitted else 1


def _grid_values(grid: Grid, dtype: torch.dtype) -> dict[str, Any]:
    if isinstance(grid, TrellisGrid):
        return {
            "bits": grid.bits,
            "data_type": grid.data_type,
            "state_bits": grid.state_bits,
            "table": TABLE_NUMBER,
            "block_size": grid.block_size,
            "scale_dtype": DTYPE_NAMES[grid.scale_dtype],
        }
    if isinstance(grid, BlockGrid):
        return {
            "bits": grid.bits,
            "data_type": grid.data_type,
            "levels": list(grid.codebook.levels),
            "block_size": grid.block_size,
            "scale_dtype": DTYPE_NAMES[grid.scale_dtype],
        }
    return {
        "bits": grid.bits,
        "data_type": grid.data_type,
        "zero": grid.zero,
        "group_size": grid.group_size,
        "scale_dtype": DTYPE_NAMES[grid.scale_dtype],
        "zero_dtype": DTYPE_NAMES[grid.zero_dtype],
        **({} if grid.value_dtype == dtype else {"value_dtype": DTYPE_NAMES[grid.value_dtype]}),
    }
