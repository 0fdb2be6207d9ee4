"""`compressed-tensors`: packed integers in the compressed-tensors library's own layout (`pack-quantized`).

For a linear layer at on-disk path P with K inputs and N outputs:

| tensor | dtype | shape |
|---|---|---|
| `P.weight_packed` | int32 | [N, ceil(K * bits / 32)], each row a bit stream of codes, least significant bit first |
| `P.weight_scale` | the model's dtype | [N, groups] |
| `P.weight_shape` | int64 | [2] |
| `P.weight_zero_point` | int32 | [ceil(N * bits / 32), groups], packed along N; asymmetric only |

Q = scale · (code - zero) in the scale's dtype, which is the model's, so that every path through the library gives the
same numbers. `dequantize` in the config makes transformers unpack while loading: plain layers that train and merge.

Experts that are separate tensors in the checkpoint stay separate, and transformers (5.23,
`integrations/compressed_tensors.py`) unpacks each before it stacks them. They cannot have zero points, must have the
same width, and are quantized together or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loftq_cli.formats.base import (
    ANY_REQUEST,
    FormatDefaults,
    GridRequest,
    QuantizedMatrix,
    Refusal,
    Request,
    affine_grid,
    groups_of,
)
from loftq_cli.formats.compressed_tensors import QUANT_METHOD
from loftq_cli.formats.refusals import INSTEAD, integers_only, whole_groups
from loftq_cli.formats.skip_lists import any_number, kept_patterns
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, Zero
from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize
from loftq_cli.numerics.grids.packing import pack_words, unpack_words
from loftq_cli.tensorfile.tensors import OutputTensor

_GATES = ("gate", "router")


class CompressedTensorsFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    name = "compressed-tensors"
    holds_experts = True  # transformers unpacks each before it stacks them

    def refuse(self, matrices: Sequence[QuantizedMatrix], request: Request) -> str | None:
        if request.dense_experts:
            return (
                "transformers unpacks every expert that it stacks, so none can stay in full precision as "
                f"{request.dense_experts[0]} would: quantize all of them, or {INSTEAD}"
            )
        grids = {affine_grid(matrix) for matrix in matrices if matrix.kind != "expert"}
        expert_grids = {affine_grid(matrix) for matrix in matrices if matrix.kind == "expert"}
        if len(expert_grids) > 1:
            return f"transformers unpacks experts at one bit width only: give all of them the same, or {INSTEAD}"
        if len(grids) > 1 and request.dequantize:
            return f"unpacking while loading needs one bit width for all matrices: give --compressed, or {INSTEAD}"
        if any(grid.zero == "integer" for grid in grids) and not request.dequantize:
            return "asymmetric integers load only with --dequantize: drop --compressed, or give --symmetric"
        return None

    def grid(self, request: GridRequest) -> Grid | Refusal:
        if refusal := integers_only(request):
            return refusal
        if request.kind == "embedding":
            return Refusal(f"it cannot quantize embeddings: {INSTEAD}", fatal=True)
        if request.kind == "conv1d":
            return Refusal(f"the library supports linear layers but not Conv1D: {INSTEAD}", fatal=True)
        if refusal := whole_groups(request):
            return refusal
        if request.kind == "expert" and not request.symmetric:
            return Refusal(
                f"transformers unpacks experts without zero points only: give --symmetric, or {INSTEAD}", fatal=True
            )
        dtype = request.dtype
        zero: Zero = "none" if request.symmetric else "integer"
        return AffineGrid(
            request.bits,
            request.block_size,
            zero,
            scale_dtype=dtype,
            value_dtype=dtype,
            product_dtype=dtype,
            scale_rule=request.scale_rule,
        )

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        grid, prefix, (n_out, n_in) = affine_grid(matrix), matrix.prefix, matrix.shape
        n_groups = grid.n_blocks(1, n_in)
        found = (
            OutputTensor(f"{prefix}.weight_packed", torch.int32, (n_out, -(-n_in * grid.bits // 32))),
            OutputTensor(f"{prefix}.weight_scale", grid.scale_dtype, (n_out, n_groups)),
            OutputTensor(f"{prefix}.weight_shape", torch.int64, (2,)),
        )
        if grid.zero == "none":
            return found
        words = -(-n_out * grid.bits // 32)
        return *found, OutputTensor(f"{prefix}.weight_zero_point", torch.int32, (words, n_groups))

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        grid, found = affine_grid(matrix), groups_of(quantized)
        packed, scale, shape, *zeros = self.tensors(matrix)
        encoded = {
            packed.name: pack_words(found.codes, grid.bits),
            scale.name: found.scales.to(scale.dtype),
            shape.name: torch.tensor(matrix.shape),
        }
        if found.zeros is not None:
            encoded[zeros[0].name] = pack_words(found.zeros.to(torch.uint8).T, grid.bits).T.contiguous()
        return encoded

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        grid = affine_grid(matrix)
        packed, scale, _, *zeros = self.tensors(matrix)
        codes = unpack_words(read(packed.name), grid.bits, matrix.in_features)
        points = None
        if zeros:
            points = unpack_words(read(zeros[0].name).T, grid.bits, matrix.out_features).T.float()
        return dequantize(QuantizedGroups(codes, read(scale.name).float(), points), grid)

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "dequantize": request.dequantize,
            "ignore": _ignored(matrices, dense_linears, request),
            "config_groups": {
                f"group_{i}": {"targets": targets, "weights": _weights(grid)}
                for i, (targets, grid) in enumerate(_groups(matrices))
            },
        }


def _groups(matrices: Sequence[QuantizedMatrix]) -> list[tuple[list[str], AffineGrid]]:
    """Return targets and scheme of every group. If there are several widths, the most common one applies to all linear
    layers and the others list their modules. Experts come first, because transformers applies the first group whose
    pattern contains "experts" to them, and use names on disk, because the running model has no modules for them."""
    grids = [affine_grid(matrix) for matrix in matrices]
    experts = {matrix.prefix: grid for matrix, grid in zip(matrices, grids) if matrix.kind == "expert"}
    if len(set(grids)) == 1:
        return [(["Linear"], grids[0])]
    linear: dict[AffineGrid, list[str]] = {}
    for matrix, grid in zip(matrices, grids):
        if matrix.kind != "expert":
            linear.setdefault(grid, []).append(matrix.module)
    common = max(linear, key=lambda grid: len(linear[grid]))
    named = [([f"re:^{re.escape(name)}$" for name in linear[grid]], grid) for grid in linear if grid != common]
    patterns = list(dict.fromkeys(_any_number(prefix) for prefix in experts))
    first = [(patterns, next(iter(experts.values())))] if experts else []
    return [*first, *named, (["Linear"], common)]


def _routers(matrices: Sequence[QuantizedMatrix]) -> list[str]:
    """Return patterns for routers next to experts, which are Linear modules in other readers than transformers."""
    prefixes = [matrix.prefix.partition(".experts.") for matrix in matrices if matrix.kind == "expert"]
    return list(
        dict.fromkeys(_any_number(f"{block}.{name}") for block, found, _ in prefixes if found for name in _GATES)
    )


def _ignored(matrices: Sequence[QuantizedMatrix], dense_linears: Sequence[str], request: Request) -> list[str]:
    """Return the names and patterns of everything that stays in full precision."""
    kept = (f"re:{pattern}" for pattern in kept_patterns(request.kept_matrices, dense_linears, matrices))
    return list(dict.fromkeys([*dense_linears, *_routers(matrices), *kept]))


def _any_number(prefix: str) -> str:
    return f"re:{any_number(prefix)}"


def _weights(grid: AffineGrid) -> dict[str, Any]:
    """Return one scheme in the library's own terms."""
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.zero == "none",
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size or None,
        "dynamic": False,
    }
