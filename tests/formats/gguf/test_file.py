"""The header of a GGUF file: golden bytes, and where its tensors start."""

from __future__ import annotations

import struct

import torch

from loftq_cli.formats.gguf.file import GgmlType, file_layout
from loftq_cli.tensorfile.tensors import OutputTensor


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def test_header_bytes_are_golden() -> None:
    tensors = [
        OutputTensor("a.weight", torch.uint8, (3, 36)),
        OutputTensor("b.weight", torch.bfloat16, (5,)),
        OutputTensor("c.weight", torch.float32, (2, 3)),
    ]
    values = {
        "general.architecture": "llama",
        "n": 7,
        "x": 0.5,
        "s": "größe",
        "tokens": ["a", "é"],
        "types": [1, 3],
        "scores": [0.0, -1.0],
        "none": [],
    }
    file = file_layout("model.gguf", tensors, {"a.weight": (GgmlType.Q4_0, (3, 64))}, values)
    expected = b"".join(
        [
            b"GGUF" + struct.pack("<IQQ", 3, 3, 7),
            text("general.architecture") + struct.pack("<I", 8) + text("llama"),
            text("n") + struct.pack("<II", 4, 7),
            text("x") + struct.pack("<If", 6, 0.5),
            text("s") + struct.pack("<I", 8) + text("größe"),
            text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é"),
            text("types") + struct.pack("<IIQii", 9, 5, 2, 1, 3),
            text("scores") + struct.pack("<IIQff", 9, 6, 2, 0.0, -1.0),
            text("a.weight") + struct.pack("<IQQIQ", 2, 64, 3, 2, 0),
            text("b.weight") + struct.pack("<IQIQ", 1, 5, 30, 128),
            text("c.weight") + struct.pack("<IQQIQ", 2, 3, 2, 0, 160),
        ]
    )
    expected += bytes(-len(expected) % 32)
    assert file.header == expected
    assert file.starts == {"a.weight": len(expected), "b.weight": len(expected) + 128, "c.weight": len(expected) + 160}
    assert file.tensors == tuple(tensors) and file.name == "model.gguf"
