"""Names of dtypes as safetensors writes them, and casts that check for overflow."""

from __future__ import annotations

import torch

from loftq_cli.errors import LoftqError

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


def to_dtype(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return the tensor in another dtype.

    Raises:
        LoftqError: a finite number becomes infinite, because the new dtype cannot represent it.
    """
    result = tensor.to(dtype)
    if result.dtype != tensor.dtype and result.dtype.is_floating_point and tensor.dtype.is_floating_point:
        lost = result.isinf() & tensor.isfinite()
        if bool(lost.any()):
            short, highest = str(dtype).removeprefix("torch."), float(tensor[lost].abs().max())
            raise LoftqError(
                f"{name} holds numbers up to {highest:.4g}, which {short} cannot represent: choose another --dtype, "
                "such as bfloat16 or float32."
            )
    return result
