"""Matrices of experts: their places in the running model, which stacks them in one parameter.

transformers 5 keeps the experts of a layer as 3-D parameters, `[experts, out, in]` or, if the module sets
`is_transposed`, `[experts, in, out]`. A checkpoint stores the same 3-D tensor or one matrix per expert; in the second
case `gate` and `up` are concatenated along their outputs during loading. PEFT adapts the parameter
(`target_parameters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.machine.json_record import Count, Size, json_record

if TYPE_CHECKING:
    from loftq_cli.modules.names import Conversion, RuntimeName
    from loftq_cli.modules.view import ModelView


@json_record
@dataclass(frozen=True)
class Expert:
    """Place of one expert's matrix in the running model, which stacks experts in one parameter.

    Attributes:
        index, count: number of this expert, and of all experts.
        part, parts: number of this matrix, and of all matrices that the model concatenates along their outputs (gate
            and up) for one expert.
        stacked: the checkpoint itself stores one 3-D tensor of all experts.
        transposed: that tensor is [experts, in, out], not [experts, out, in].
        depth: number of parameters of the same module that PEFT wraps after this one; PEFT's keys depend on it.
    """

    index: Count
    count: Size
    part: Count = 0
    parts: Size = 1
    stacked: bool = False
    transposed: bool = False
    depth: Count = 0


def is_expert(view: ModelView, name: RuntimeName, path: str) -> bool:
    """True if a tensor is a stacked parameter of experts, or part of one."""
    from torch import nn

    key, module = name.key or "", view.modules[path]
    stack = view.state[key].ndim == 3 and key in view.parameters and not isinstance(module, nn.modules.conv._ConvNd)
    return stack and "expert" in f"{key} {type(module).__name__}".lower()


def find_expert(view: ModelView, name: RuntimeName, path: str, shape: tuple[int, ...]) -> Expert | None:
    """Return the place of a tensor of experts, or None if transformers rearranges it so that no matrix stays whole."""
    expected = tuple(view.state[name.key or ""].shape)
    transposed = bool(getattr(view.modules[path], "is_transposed", False))
    if name.conversion is None:
        return Expert(0, expected[0], stacked=True, transposed=transposed)
    if len(shape) == 3:
        return _transposed(name.conversion, shape, expected, transposed)
    steps = [type(step).__name__ for step in name.conversion.operations]
    dims = [getattr(step, "dim", None) for step in name.conversion.operations]
    parts = name.conversion.sources
    merges = (steps, dims) in ((["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1]))
    if transposed or not merges or expected[1:] != (parts * shape[0], *shape[1:]):
        return None
    return Expert(name.conversion.position, expected[0], name.conversion.source, parts)


def _transposed(
    conversion: Conversion, shape: tuple[int, ...], expected: tuple[int, ...], transposed: bool
) -> Expert | None:
    """Return the place of a stacked tensor that transformers transposes, either always or if its shape differs."""
    steps = conversion.operations
    if len(steps) != 1 or type(steps[0]).__name__ != "Transpose" or {steps[0].dim0, steps[0].dim1} != {1, 2}:
        return None
    turned = not steps[0].check_dims or shape != expected
    if expected != ((shape[0], shape[2], shape[1]) if turned else shape):
        return None
    return Expert(0, shape[0], stacked=True, transposed=transposed != turned)
