"""Where the matrix of one expert stands, as plan, files, adapter and manifest all say it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expert:
    """Where one expert's matrix stands in the running model, which stacks experts in one parameter.

    Attributes:
        index, count: which expert of how many.
        part, parts: where the model joins several matrices of an expert along their outputs (gate and up), which of
            them this is.
        stacked: the checkpoint itself stores one 3-D tensor of all experts.
        transposed: that tensor is [experts, in, out], not [experts, out, in].
        depth: how many parameters of the same module PEFT wraps after this one, which its keys count.
    """

    index: int
    count: int
    part: int = 0
    parts: int = 1
    stacked: bool = False
    transposed: bool = False
    depth: int = 0
