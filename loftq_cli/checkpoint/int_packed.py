"""Integer weights of compressed-tensors in the `pack-quantized` layout, such as Kimi-K2-Thinking's experts.

`X.weight_packed` int32 [out, in · bits / 32] holds codes offset by 2^(bits-1), the first in the lowest bits;
`X.weight_scale` [out, groups] multiplies. Asymmetric weights have `X.weight_zero_point` int32
[out · bits / 32, groups], packed along the rows. Weights quantized in activation order have `X.weight_g_idx` [in], the
group of every column.
(compressed-tensors 0.14, `compressors/pack_quantized`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq_cli.checkpoint.base import TensorInfo

PACKED = "weight_packed"
_WIDTHS = (1, 2, 4, 8)  # codes of other widths cross the borders of int32
_BESIDE = ("weight_shape", "weight_zero_point", "weight_g_idx")
_SCALE_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class IntScheme:
    """Quantization settings of all packed weights; `group_size` is None for one scale per row or per matrix."""

    bits: int
    symmetric: bool
    group_size: int | None


@dataclass(frozen=True)
class IntPacked:
    """The stored tensors of one weight by name; `zeros` and `groups` may be missing."""

    values: str
    scales: str
    scheme: IntScheme
    zeros: str | None = None
    groups: str | None = None
    shape: str | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for name in (self.values, self.scales, self.zeros, self.groups, self.shape) if name)


def int_scheme(quantization: Mapping[str, Any]) -> IntScheme | None:
    """Return the settings in a compressed-tensors config; None if it has several, or none that can be computed here."""
    groups = quantization.get("config_groups")
    schemes = {_scheme(group) for group in groups.values()} if isinstance(groups, Mapping) else set()
    return schemes.pop() if len(schemes) == 1 else None


def _scheme(group: object) -> IntScheme | None:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if (
        not isinstance(weights, Mapping)
        or weights.get("type", "int") != "int"
        or weights.get("num_bits") not in _WIDTHS
    ):
        return None
    size = weights.get("group_size")
    grouped = weights.get("strategy") == "group" and type(size) is int and size > 0
    if not grouped and weights.get("strategy") not in ("channel", "tensor"):
        return None
    return IntScheme(int(weights["num_bits"]), weights.get("symmetric", True) is True, size if grouped else None)


def find_int_packed(tensors: Mapping[str, TensorInfo], scheme: IntScheme | None) -> dict[str, IntPacked]:
    """Return the packed weights by their names in the model."""
    found: dict[str, IntPacked] = {}
    for name in tensors if scheme is not None else ():
        module = name.removesuffix(PACKED)
        if module == name or f"{module}weight_scale" not in tensors or f"{module}weight" in tensors:
            continue
        shape, zeros, groups = (module + part if module + part in tensors else None for part in _BESIDE)
        assert scheme is not None
        if (zeros is None) == scheme.symmetric:
            found[f"{module}weight"] = IntPacked(name, f"{module}weight_scale", scheme, zeros, groups, shape)
    return found


def unpacked_info(name: str, weight: IntPacked, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """Return the dtype and shape of the weight that the stored tensors encode.

    Raises:
        ValueError: the tensors do not fit together.
    """
    values, scales, scheme = tensors[weight.values], tensors[weight.scales], weight.scheme
    per_word = 32 // scheme.bits
    if values.dtype is not torch.int32 or len(values.shape) != 2 or scales.dtype not in _SCALE_TYPES:
        raise ValueError(f"{list(values.shape)} {values.dtype} with scales of {scales.dtype}")
    rows, columns = values.shape[0], values.shape[1] * per_word
    misfit = ValueError(f"scales {list(scales.shape)} do not fit {list(values.shape)} words of {scheme.bits} bits")
    if scheme.group_size is None:
        if scales.shape not in ((1,), (), (rows,), (rows, 1), (1, 1)):
            raise misfit
    else:
        if len(scales.shape) != 2 or scales.shape[0] != rows:
            raise misfit
        if scales.shape[1] != -(-columns // scheme.group_size):
            columns = scales.shape[1] * scheme.group_size  # the last word is padded
        if -(-columns // per_word) != values.shape[1]:
            raise misfit
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    zeros = (-(-rows // per_word), groups)
    if weight.zeros and (tensors[weight.zeros].shape != zeros or tensors[weight.zeros].dtype is not torch.int32):
        raise ValueError(f"{weight.zeros} is {list(tensors[weight.zeros].shape)}, not {list(zeros)}")
    if weight.groups and (tensors[weight.groups].shape != (columns,) or tensors[weight.groups].dtype.is_floating_point):
        raise ValueError(f"{weight.groups} is {list(tensors[weight.groups].shape)}, not {[columns]}")
    return TensorInfo(name, scales.dtype, (rows, columns), values.file, values.start)


def dequantize_int(
    values: Tensor, scales: Tensor, scheme: IntScheme, zeros: Tensor | None = None, groups: Tensor | None = None
) -> Tensor:
    """Return (code - zero) × scale as [out, in] of the scales' dtype, computed in float32 and rounded once.

    Args:
        values: int32 [out, words].
        scales: [out, groups], or a single one per row or matrix.
        zeros: int32 [out · bits / 32, groups], or None for symmetric weights.
        groups: [in], the group of every column; None, or negative numbers, for consecutive groups.

    Raises:
        ValueError: a column has a group without a scale.
    """
    codes = _unpack(values, scheme.bits)
    rows = len(codes)
    grid = scales.float().reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1).expand(rows, -1)
    width = codes.shape[1]
    if scheme.group_size is not None and -(-width // scheme.group_size) != grid.shape[1]:
        width = grid.shape[1] * scheme.group_size
    codes = codes[:, :width].float()
    if groups is not None and bool((groups >= 0).all()):
        column = groups.long()
        if bool((column >= grid.shape[1]).any()):
            raise ValueError(f"a column of group {int(column.max())}, with scales for {grid.shape[1]} groups")
    else:
        column = torch.arange(width) // (scheme.group_size or width)
    if zeros is not None:
        codes -= _unpack(zeros.T.contiguous(), scheme.bits)[:, :rows].T.float()[:, column]
    return codes.mul_(grid[:, column]).to(scales.dtype)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return the signed codes int8 [rows, words · 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    result = torch.empty(len(words), words.shape[1] * len(shifts), dtype=torch.int8)
    offset, mask = 1 << (bits - 1), (1 << bits) - 1
    for first in range(0, len(words), 256):
        chunk = (words[first : first + 256, :, None] >> shifts) & mask
        result[first : first + 256] = (chunk - offset).to(torch.int8).flatten(1)
    return result
