"""Join the adapters that several experts share, the last step before files are read back.

In a shared lora_B PEFT's expert index varies fastest, so the values of one expert are not contiguous. Units therefore
write their own lora_b contiguously to a scratch file, and this step scatters it, a few rows at a time. The same pieces
produce the same bytes, so an interrupted run simply repeats the step.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from loftq_cli.formats.adapter import AdapterTarget, adapter_tensors, own_columns
from loftq_cli.planning.plan import Plan
from loftq_cli.tensorfile.tensors import OutputTensor
from loftq_cli.tensorfile.writer import ShardWriter, tensor_bytes

_ROWS_BYTES = 64 << 20  # of the joint tensor in memory at a time


def join_adapters(plan: Plan, writer: ShardWriter) -> dict[str, str]:
    """Fill the lora_B of all experts from the output of their units; parts without an adapter stay zero.

    Returns:
        The sha256 of the bytes written for each joined tensor.
    """
    hashes = {}
    for joint, targets in plan.joint_adapters.items():
        parts: dict[int, list[AdapterTarget]] = {}
        for target in targets:
            assert target.expert is not None
            parts.setdefault(target.expert.part, []).append(target)
        digest, position = hashlib.sha256(), 0
        for part in sorted(parts):
            begin = part * parts[part][0].out_features * joint.row_bytes
            digest.update(bytes(begin - position))
            position = begin + _join_part(joint, parts[part], writer, digest)
        digest.update(bytes(joint.nbytes - position))
        hashes[joint.name] = digest.hexdigest()
    writer.flush()
    return hashes


def _join_part(joint: OutputTensor, targets: list[AdapterTarget], writer: ShardWriter, digest: Any) -> int:
    """Write the rows of one part (gate, or up) of all experts; return their number of bytes."""
    step = max(1, _ROWS_BYTES // joint.row_bytes)
    assert targets[0].expert is not None
    height = targets[0].out_features
    begin = targets[0].expert.part * height
    for first in range(0, height, step):
        rows = torch.zeros(min(step, height - first), joint.shape[1])
        for target in targets:
            own = adapter_tensors(target)[1]
            content = writer.read(own.name, first * own.row_bytes, len(rows) * own.row_bytes)
            piece = torch.frombuffer(bytearray(content), dtype=own.dtype).view(len(rows), target.rank)
            own_columns(target, rows).copy_(piece)
        digest.update(tensor_bytes(rows))
        writer.write_at(joint.name, (begin + first) * joint.row_bytes, rows)
    return height * joint.row_bytes
