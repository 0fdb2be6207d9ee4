"""`bnb`: a pre-quantized bitsandbytes NF4 checkpoint, which stock transformers and serving engines load as it is.

Layout as bitsandbytes' `QuantState.as_dict(packed=True)` writes it. Blocks run over the flattened matrix, two codes a
byte with the even one in the high nibble. 2-bit NormalFloat levels are four of NF4's sixteen, so a 2-bit backbone is
carried without loss (at 4-bit storage), and so are the 4 or 8 levels of `nf4-subset`; 3-bit NormalFloat's are not and
are refused.

Scales stay positive. A pre-quantized state loads as it is, whatever its scales. Only who dequantizes the backbone and
lets bitsandbytes quantize it anew gets other numbers where scales were fitted and a block uses neither -1 nor 1: at 3
and 4 bits some 0.1 % of blocks, none at 2. A scale of at most absmax / 0.8615 (NF4's last threshold) would rule it out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.formats.base import DTYPE_NAMES, GridRequest, OutputTensor, QuantizedMatrix, Refusal
from loftq_cli.numerics.blocks import BlockGrid, QuantizedBlocks, dequantize
from loftq_cli.numerics.codebooks import Codebook, codebook

_NF4 = codebook("nf", 4)
_ZERO_CODE = _NF4.levels.index(0.0)
_SMALLEST_BLOCK = 32  # bitsandbytes 0.50 takes powers of two from 32 on


def nf4_codes_of(book: Codebook) -> tuple[int, ...] | None:
    """The NF4 code of each level, or None where a level is not one of NF4's."""
    if not set(book.levels) <= set(_NF4.levels):
        return None
    return tuple(_NF4.levels.index(level) for level in book.levels)


def safe_block_size(block_size: int, in_features: int) -> int | None:
    """The largest block size up to `block_size` that every bitsandbytes kernel decodes, or None.

    Its AVX-512 kernel (0.50.2, measured) decodes wrongly where rows of a multiple of 16 columns are no whole number of
    blocks; other row lengths take a path that is right.
    """
    if in_features % 16:
        return block_size
    while block_size >= _SMALLEST_BLOCK:
        if in_features % block_size == 0:
            return block_size
        block_size //= 2
    return None


class BnbFormat:
    """See the module's docstring; implements `formats.base.Format`."""

    name = "bnb"
    holds_experts = False

    def grid(self, request: GridRequest) -> BlockGrid | Refusal:
        book = codebook(request.data_type, request.bits)
        if nf4_codes_of(book) is None:
            reason = (
                f"a bitsandbytes checkpoint holds NF4's sixteen levels, which {request.bits}-bit {book.data_type} "
                "levels are not among: use --format packed or --format dense"
            )
            return Refusal(reason, fatal=True)
        if book.fitted:
            return Refusal("only packed files have room for --levels fitted: use --levels nf4-subset", fatal=True)
        if request.kind == "embedding":
            return Refusal("bitsandbytes quantizes no embeddings: use --format packed or --format dense", fatal=True)
        block_size = safe_block_size(request.block_size, request.in_features)
        if block_size is None:
            return Refusal(f"bitsandbytes' CPU kernel misreads rows of {request.in_features} elements", fatal=False)
        return BlockGrid(book, block_size, "flat", scale_dtype=request.dtype, value_dtype=request.dtype)

    def tensors(self, matrix: QuantizedMatrix) -> tuple[OutputTensor, ...]:
        name, elements = matrix.tensor, matrix.out_features * matrix.in_features
        return (
            OutputTensor(name, torch.uint8, (-(-elements // 2), 1)),
            OutputTensor(f"{name}.absmax", torch.float32, (matrix.grid.n_blocks(*matrix.shape),)),
            OutputTensor(f"{name}.quant_map", torch.float32, (len(_NF4.levels),)),
            OutputTensor(f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (len(_quant_state(matrix)),)),
        )

    def encode(self, matrix: QuantizedMatrix, quantized: QuantizedBlocks) -> dict[str, Tensor]:
        weight, absmax, quant_map, state = self.tensors(matrix)
        mapping = torch.tensor(nf4_codes_of(matrix.grid.codebook), dtype=torch.uint8, device=quantized.codes.device)
        codes = mapping[quantized.codes.reshape(-1).int()]
        codes = F.pad(codes, (0, codes.numel() % 2), value=_ZERO_CODE)
        return {
            weight.name: (codes[0::2] << 4 | codes[1::2]).unsqueeze(1),
            absmax.name: quantized.absmax,
            quant_map.name: torch.tensor(_NF4.levels, dtype=torch.float32),
            state.name: torch.frombuffer(bytearray(_quant_state(matrix)), dtype=torch.uint8),
        }

    def decode(self, matrix: QuantizedMatrix, read: Callable[[str], Tensor]) -> Tensor:
        weight, absmax, _, _ = self.tensors(matrix)
        packed = read(weight.name).reshape(-1)
        codes = torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)
        codes = codes[: matrix.out_features * matrix.in_features].reshape(matrix.shape)
        nf4 = BlockGrid(_NF4, matrix.grid.block_size, "flat", matrix.grid.scale_dtype, matrix.grid.value_dtype)
        return dequantize(QuantizedBlocks(codes, read(absmax.name)), nf4)

    def quantization_config(
        self, matrices: Sequence[QuantizedMatrix], dense_linears: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": DTYPE_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            # Replaces transformers' own list, so it names every linear layer that is not packed.
            "llm_int8_skip_modules": [_skip_entry(module, matrices) for module in dense_linears],
        }


def _skip_entry(module: str, matrices: Sequence[QuantizedMatrix]) -> str:
    """A plain path, which every reader knows; anchored where transformers would match it as the end of another's."""
    ambiguous = any(matrix.module.endswith(module) for matrix in matrices)
    return f"^{re.escape(module)}$" if ambiguous else module


def _quant_state(matrix: QuantizedMatrix) -> bytes:
    """The JSON bitsandbytes keeps beside the codes (QuantState.as_dict)."""
    state = {
        "quant_type": "nf4",
        "blocksize": matrix.grid.block_size,
        "dtype": DTYPE_NAMES[matrix.grid.value_dtype],
        "shape": list(matrix.shape),
    }
    return json.dumps(state).encode()
