"""Pack codes of 2, 3, 4 or 8 bits into bytes: each row is one little-endian bit stream, padded to a whole byte.

Code i of a row occupies bits [i * bits, (i + 1) * bits) of the row's stream, least significant bit first. Rows are
independent, so packed matrices can be concatenated or split along the output dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loftq_cli.numerics.grids.panels import panels

# The number of codes that fill a whole number of bytes: 8 codes of 3 bits are 3 bytes.
_GROUP = {2: 4, 3: 8, 4: 2, 8: 1}


def packed_width(columns: int, bits: int) -> int:
    """Return the number of bytes of one packed row."""
    return -(-columns * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns], each below 2**bits -> uint8 [rows, packed_width(columns, bits)]."""
    packed = codes.new_empty(codes.shape[0], packed_width(codes.shape[1], bits))
    group, n_bytes = _GROUP[bits], _GROUP[bits] * bits // 8
    for rows in panels(codes):
        grouped = F.pad(codes[rows], (0, -codes.shape[1] % group)).unflatten(1, (-1, group))
        stream = codes.new_zeros(*grouped.shape[:2], n_bytes)
        for code, byte, shift in _overlaps(bits):
            stream[..., byte] |= _shifted(grouped[..., code], shift)
        packed[rows] = stream.flatten(1)[:, : packed.shape[1]]
    return packed


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 codes [rows, columns]."""
    codes = packed.new_empty(packed.shape[0], columns)
    group, n_bytes = _GROUP[bits], _GROUP[bits] * bits // 8
    for rows in panels(codes):
        stream = F.pad(packed[rows], (0, -packed.shape[1] % n_bytes)).unflatten(1, (-1, n_bytes))
        grouped = packed.new_zeros(*stream.shape[:2], group)
        for code, byte, shift in _overlaps(bits):
            grouped[..., code] |= _shifted(stream[..., byte], -shift)
        codes[rows] = (grouped & 2**bits - 1).flatten(1)[:, :columns]
    return codes


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield (code, byte, left shift of the code within the byte) for each code and byte of a group that share bits."""
    for code in range(_GROUP[bits]):
        for byte in range(_GROUP[bits] * bits // 8):
            shift = code * bits - byte * 8
            if -bits < shift < 8:
                yield code, byte, shift


def _shifted(x: Tensor, left: int) -> Tensor:
    """Shift uint8 left, or right if negative; bits shifted out of the byte are dropped."""
    return x << left if left >= 0 else x >> -left


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] -> int32 [rows, ceil(columns * bits / 32)]: the same bit stream in 32-bit words."""
    packed = pack_rows(codes, bits)
    return F.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: uint8 codes [rows, columns]."""
    return unpack_rows(words.contiguous().view(torch.uint8), bits, columns)
