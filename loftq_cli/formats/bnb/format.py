"""`bnb`: a pre-quantized bitsandbytes NF4 checkpoint, which stock transformers and serving engines load unchanged.

The layout is that of bitsandbytes' `QuantState.as_dict(packed=True)`. Blocks run over the flattened matrix, two codes
per byte with the even one in the high nibble. 2-bit NormalFloat levels are four of NF4's sixteen, so a 2-bit backbone
is stored without loss (in 4 bits), and so are the 4 or 8 levels of `nf4-subset`; 3-bit NormalFloat levels are not among
them and are refused.

Scales stay positive. A pre-quantized state loads unchanged, whatever its scales. Only dequantizing the backbone and
quantizing it again with bitsandbytes changes numbers, if scales were fitted and a block uses neither -1 nor 1: about
0.1 % of blocks at 3 and 4 bits, none at 2. A scale of at most absmax / 0.8615 (NF4's last threshold) would avoid that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.formats.base import (
    ANY_REQUEST,
    DTYPE_NAMES,
    FormatDefaults,
    GridRequest,
    QuantizedMatrix,
    Refusal,
    Request,
    block_grid,
    blocks_of,
)
from loftq_cli.formats.bnb import QUANT_METHOD
from loftq_cli.formats.refusals import INSTEAD
from loftq_cli.formats.skip_lists import kept_patterns
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks, dequantize
from loftq_cli.numerics.grids.codebooks import TRELLIS, Codebook, codebook
from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.grids.nested import NESTED_BLOCK, NestedScales, dynamic_map
from loftq_cli.numerics.grids.panels import panels
from loftq_cli.tensorfile.tensors import OutputTensor

_NF4 = codebook("nf", 4)
_ZERO_CODE = _NF4.levels.index(0.0)
_WIDEST_OFFSET = 1.2345678901234567e-100
_SMALLEST_BLOCK = 32  # bitsandbytes 0.50 accepts powers of two from 32


def nf4_codes_of(book: Codebook) -> tuple[int, ...] | None:
    """Return the NF4 code of each level, or None if a level is not one of NF4's."""
    if not set(book.levels) <= set(_NF4.levels):
        return None
    return tuple(_NF4.levels.index(level) for level in book.levels)


def safe_block_size(block_size: int, in_features: int) -> int | None:
    """Return the largest block size up to `block_size` that every bitsandbytes kernel decodes correctly, or None.

    Its AVX-512 kernel (0.50.2, measured) decodes wrongly if rows are a multiple of 16 columns but not a whole number of
    blocks; other row lengths take a code path that is correct.
    """
    if in_features % 16:
        return block_size
    while block_size >= _SMALLEST_BLOCK:
        if in_features % block_size == 0:
            return block_size
        block_size //= 2
    return None


class BnbFormat(FormatDefaults):
    """See the module's docstring; implements `formats.base.Format`."""

    name = "bnb"

    def grid(self, request: GridRequest) -> BlockGrid | Refusal:
        if request.data_type == "int":
            return Refusal(f"a bitsandbytes checkpoint holds NF4 levels, not integers: {INSTEAD}", fatal=True)
        if request.data_type in TRELLIS:
            return Refusal(f"only packed and dense files can hold --levels {request.data_type}: {INSTEAD}", fatal=True)
        book = codebook(request.data_type, request.bits)
        if nf4_codes_of(book) is None:
            reason = (
                f"a bitsandbytes checkpoint holds only NF4's sixteen levels, and {request.bits}-bit {book.data_type} "
                f"levels are not among them: {INSTEAD}"
            )
            return Refusal(reason, fatal=True)
        if book.fitted:
            return Refusal("only packed files can store --levels fitted: use --levels nf4-subset", fatal=True)
        if request.kind == "embedding":
            return Refusal(f"bitsandbytes cannot quantize embeddings: {INSTEAD}", fatal=True)
        block_size = safe_block_size(request.block_size, request.in_features)
        if block_size is None:
            return Refusal(f"bitsandbytes' CPU kernel misreads rows of {request.in_features} elements", fatal=False)
        if request.double_quant:
            return BlockGrid(book, block_size, "flat", torch.float32, request.dtype, nested=True)
        return BlockGrid(book, block_size, "flat", scale_dtype=request.dtype, value_dtype=request.dtype)

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        name, elements = matrix.tensor, matrix.out_features * matrix.in_features
        grid, n_blocks = block_grid(matrix), matrix.grid.n_blocks(*matrix.shape)
        found = (
            OutputTensor(name, torch.uint8, (-(-elements // 2), 1)),
            OutputTensor(f"{name}.absmax", torch.uint8 if grid.nested else torch.float32, (n_blocks,)),
            OutputTensor(f"{name}.quant_map", torch.float32, (len(_NF4.levels),)),
            OutputTensor(f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (len(_quant_state(matrix, 0.0)),)),
        )
        if not grid.nested:
            return found
        return (
            *found,
            OutputTensor(f"{name}.nested_absmax", torch.float32, (-(-n_blocks // NESTED_BLOCK),)),
            OutputTensor(f"{name}.nested_quant_map", torch.float32, (len(dynamic_map()),)),
        )

    def encode(self, matrix: QuantizedMatrix, quantized: Quantized) -> dict[str, Tensor]:
        weight, absmax, quant_map, state, *nested = self.tensors(matrix)
        quantized, known = blocks_of(quantized), nf4_codes_of(block_grid(matrix).codebook)
        assert known is not None, "a grid of this container has NF4's levels"
        scales, offset = quantized.nested, 0.0
        found = {
            weight.name: _nibbles(quantized.codes, known),
            absmax.name: quantized.absmax if scales is None else scales.codes,
            quant_map.name: torch.tensor(_NF4.levels, dtype=torch.float32),
        }
        if scales is not None:
            offset = float(scales.offset)
            found |= {nested[0].name: scales.absmax, nested[1].name: torch.tensor(dynamic_map(), dtype=torch.float32)}
        found[state.name] = torch.frombuffer(bytearray(_quant_state(matrix, offset)), dtype=torch.uint8)
        return found

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        weight, absmax, _, state, *nested = self.tensors(matrix)
        grid, scales = block_grid(matrix), read(absmax.name)
        if nested:
            offset = torch.tensor(json.loads(bytes(read(state.name).tolist()))["nested_offset"], dtype=torch.float32)
            scales = NestedScales(scales, read(nested[0].name), offset).dequantized()
        packed = read(weight.name).reshape(-1)
        codes = torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)
        codes = codes[: matrix.out_features * matrix.in_features].reshape(matrix.shape)
        nf4 = BlockGrid(_NF4, grid.block_size, "flat", grid.scale_dtype, grid.value_dtype)
        return dequantize(QuantizedBlocks(codes, scales), nf4)

    def quantization_config(
        self,
        matrices: Sequence[QuantizedMatrix],
        dense_linears: Sequence[str],
        dtype: torch.dtype,
        request: Request = ANY_REQUEST,
    ) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(block_grid(matrix).nested for matrix in matrices),
            "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            # This replaces transformers' own list, so it names every linear layer that is not packed.
            "llm_int8_skip_modules": [
                *(_skip_entry(module, matrices) for module in dense_linears),
                *kept_patterns(request.kept_matrices, dense_linears, matrices),
            ],
        }


def _nibbles(codes: Tensor, known: Sequence[int]) -> Tensor:
    """Map codes [out, in] to NF4's codes `known`, two per byte [⌈elements / 2⌉, 1], the first one in the high half."""
    flat, mapping = codes.reshape(-1), torch.tensor(known, dtype=torch.uint8, device=codes.device)
    pairs = (F.pad(flat, (0, 1)) if flat.numel() % 2 else flat).view(-1, 2)
    packed = pairs.new_empty(pairs.shape[0], 1)
    for part in panels(pairs):
        high, low = mapping.index_select(0, pairs[part].flatten().int()).view(-1, 2).unbind(1)
        packed[part, 0] = high << 4 | low
    if flat.numel() % 2:
        packed[-1] = packed[-1] & 0xF0 | _ZERO_CODE
    return packed


def _skip_entry(module: str, matrices: Sequence[QuantizedMatrix]) -> str:
    """Return a plain path, which every reader understands, or an anchored regex if other paths end like it."""
    ambiguous = any(matrix.module.endswith(module) for matrix in matrices)
    return f"^{re.escape(module)}$" if ambiguous else module


def _quant_state(matrix: QuantizedMatrix, offset: float) -> bytes:
    """Return bitsandbytes' JSON for the codes (QuantState.as_dict); its length does not depend on the offset."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": matrix.grid.block_size,
        "dtype": DTYPE_NAMES[matrix.grid.value_dtype],
        "shape": list(matrix.shape),
    }
    if not block_grid(matrix).nested:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).ljust(len(json.dumps({**state, "nested_offset": _WIDEST_OFFSET}))).encode()
