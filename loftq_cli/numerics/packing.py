"""Codes of 2, 3, 4 or 8 bits as bytes: each row is one little-endian bit stream, padded to a whole byte.

Code i of a row holds bits [i * bits, (i + 1) * bits) of the row's stream, least significant bit first. Rows stand
alone, so that stacking or cutting matrices along the output dimension is legal on packed bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes that fill a whole number of bytes together: 8 codes of 3 bits are 3 bytes.
_GROUP = {2: 4, 3: 8, 4: 2, 8: 1}


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns], each below 2**bits -> uint8 [rows, packed_width(columns, bits)]."""
    rows, columns = codes.shape
    group, n_bytes = _GROUP[bits], _GROUP[bits] * bits // 8
    grouped = F.pad(codes, (0, -columns % group)).reshape(rows, -1, group).int()
    word = torch.zeros(grouped.shape[:2], dtype=torch.int32, device=codes.device)
    for i in range(group):
        word |= grouped[..., i] << (i * bits)
    packed = torch.stack([(word >> (8 * i)) & 0xFF for i in range(n_bytes)], dim=-1).to(torch.uint8)
    return packed.reshape(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 codes [rows, columns]."""
    rows = packed.shape[0]
    group, n_bytes = _GROUP[bits], _GROUP[bits] * bits // 8
    grouped = F.pad(packed, (0, -packed.shape[1] % n_bytes)).reshape(rows, -1, n_bytes).int()
    word = torch.zeros(grouped.shape[:2], dtype=torch.int32, device=packed.device)
    for i in range(n_bytes):
        word |= grouped[..., i] << (8 * i)
    mask = 2**bits - 1
    codes = torch.stack([(word >> (i * bits)) & mask for i in range(group)], dim=-1).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :columns].contiguous()


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] -> int32 [rows, ceil(columns * bits / 32)]: the same bit stream in 32-bit words."""
    packed = pack_rows(codes, bits)
    return F.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: uint8 codes [rows, columns]."""
    return unpack_rows(words.contiguous().view(torch.uint8), bits, columns)
