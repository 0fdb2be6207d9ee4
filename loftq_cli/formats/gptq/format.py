"""`gptq` and `gptq-v2`, for GPTQ loaders (transformers with optimum and gptqmodel, serving engines).

For a linear layer at on-disk path P with K inputs and N outputs:

| tensor | dtype | shape |
|---|---|---|
| `P.qweight` | int32 | [K * bits / 32, N], each column a bit stream of codes, least significant bit first |
| `P.qzeros` | int32 | [groups, N * bits / 32], likewise along N: the zero point (v2) or one less (v1) |
| `P.scales` | float16 | [groups, N] |
| `P.g_idx` | int32 | [K], the group of each input |

Q = scale · (code - zero), rounded to float16 whatever the model's dtype is, and then to the model's dtype. Zero points
from 1 fit both layouts. Symmetric checkpoints have the zero 2**(bits - 1) everywhere.
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
from loftq_cli.formats.gptq import QUANT_METHOD
from loftq_cli.formats.refusals import INSTEAD, integers_only, whole_groups
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, Zero
from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize
from loftq_cli.numerics.grids.packing import pack_words, unpack_words
from loftq_cli.tensorfile.tensors import OutputTensor

_WORD = 32  # codes that fill whole int32 words at every width
# Where optimum looks for a decoder's blocks; nothing outside them is quantized.
_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")
_IN_BLOCK = re.compile(rf"(?:{'|'.join(re.escape(path) for path in _BLOCKS)})\.\d+\.(.+)")


class GptqFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    def __init__(self, name: str, checkpoint_format: str, stored_less: int) -> None:
        self.name = name
        self._checkpoint_format = checkpoint_format
        self._stored_less = stored_less  # subtracted from a zero point before it is stored

    def refuse(self, matrices: Sequence[QuantizedMatrix], request: Request) -> str | None:
        if request.task_type != "CAUSAL_LM":
            return f"its loaders support decoder-only language models only: {INSTEAD}"
        if len({matrix.grid for matrix in matrices}) > 1:
            return f"it has one bit width and group size for all matrices: {INSTEAD}"
        return None

    def grid(self, request: GridRequest) -> Grid | Refusal:
        if refusal := integers_only(request):
            return refusal
        if request.kind in ("embedding", "head"):
            return Refusal(f"its loaders do not quantize embeddings and heads: {INSTEAD}", fatal=True)
        if not _IN_BLOCK.fullmatch(request.module):
            return Refusal("GPTQ loaders quantize only the blocks of a decoder", fatal=False)
        if refusal := whole_groups(request):
            return refusal
        if request.in_features % _WORD or request.out_features % _WORD:
            return Refusal(f"words of {self.name} need multiples of {_WORD} rows and columns", fatal=False)
        half = torch.float16
        zero: Zero = "none" if request.symmetric else "integer"
        return AffineGrid(
            request.bits,
            request.block_size,
            zero,
            scale_dtype=half,
            value_dtype=request.dtype,
            product_dtype=half,
            scale_rule=request.scale_rule,
            least_zero=1,
        )

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        grid, prefix, (n_out, n_in) = matrix.grid, matrix.prefix, matrix.shape
        n_groups = grid.n_blocks(1, n_in)
        return (
            OutputTensor(f"{prefix}.qweight", torch.int32, (n_in * grid.bits // _WORD, n_out)),
            OutputTensor(f"{prefix}.qzeros", torch.int32, (n_groups, n_out * grid.bits // _WORD)),
            OutputTensor(f"{prefix}.scales", torch.float16, (n_groups, n_out)),
            OutputTensor(f"{prefix}.g_idx", torch.int32, (n_in,)),
        )

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        grid, found = affine_grid(matrix), groups_of(quantized)
        weight, zeros, scales, index = self.tensors(matrix)
        points = torch.full_like(found.scales, 2 ** (grid.bits - 1)) if found.zeros is None else found.zeros
        stored = (points - self._stored_less).to(torch.uint8).T
        columns = torch.arange(matrix.in_features, dtype=torch.int32)
        return {
            weight.name: pack_words(found.codes, grid.bits).T.contiguous(),
            zeros.name: pack_words(stored, grid.bits),
            scales.name: found.scales.to(torch.float16).T.contiguous(),
            index.name: columns // grid.width(matrix.in_features),
        }

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        grid = affine_grid(matrix)
        weight, zeros, scales, _ = self.tensors(matrix)
        codes = unpack_words(read(weight.name).T, grid.bits, matrix.in_features)
        points = unpack_words(read(zeros.name), grid.bits, matrix.out_features).T.float() + self._stored_less
        stored = None if grid.zero == "none" else points
        return dequantize(QuantizedGroups(codes, read(scales.name).T.float(), stored), grid)

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> dict[str, Any]:
        grid = affine_grid(matrices[0])
        config: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "bits": grid.bits,
            "group_size": grid.group_size or -1,
            "sym": grid.zero == "none",
            "desc_act": False,
            "lm_head": False,
            "format": self._checkpoint_format,
            "checkpoint_format": self._checkpoint_format,
            "meta": {"quantizer": ["loftq"]},
        }
        if listed := _listed(matrices, (*dense_linears, *request.kept_matrices)):
            config["modules_in_block_to_quantize"] = [listed]
        return config


def _listed(matrices: Sequence[QuantizedMatrix], dense: Sequence[str]) -> list[str]:
    """Return suffixes of paths that match exactly the quantized modules: short ones if all blocks are alike.

    None are needed if everything in the blocks is quantized. Blocks that only serving engines build, such as those for
    multi-token prediction, count as well, wherever they are.
    """
    short = sorted({match[1] for matrix in matrices if (match := _IN_BLOCK.fullmatch(matrix.module))})
    if any(module.endswith(f".{name}") for module in dense for name in short):
        return [matrix.module for matrix in matrices]
    return short if any(_IN_BLOCK.fullmatch(module) for module in dense) else []
