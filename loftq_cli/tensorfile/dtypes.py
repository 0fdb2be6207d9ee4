"""Names of dtypes in safetensors files."""

from __future__ import annotations

import torch

# torch types for the names that safetensors uses.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on; the scales of some FP8 checkpoints
    TORCH_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
SAFETENSORS_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
