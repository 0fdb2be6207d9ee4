"""Matrices of experts: where the running model, which stacks them in one parameter, keeps each.

transformers 5 holds the experts of a layer as 3-D parameters, `[experts, out, in]` or, where the module says
`is_transposed`, `[experts, in, out]`. On disk they are such a tensor too, or one matrix an expert; then `gate` and `up`
are joined along their outputs while loading. PEFT adapts the parameter (`target_parameters`).
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
    """Where one expert's matrix stands in the running model, which stacks experts in one parameter.

    Attributes:
        index, count: which expert of how many.
        part, parts: where the model joins several matrices of an expert along their outputs (gate and up), which of
            them this is.
        stacked: the checkpoint itself stores one 3-D tensor of all experts.
        transposed: that tensor is [experts, in, out], not [experts, out, in].
        depth: how many parameters of the same module PEFT wraps after this one, which its keys count.
    """

    index: Count
    count: Size
    part: Count = 0
    parts: Size = 1
    stacked: bool = False
    transposed: bool = False
    depth: Count = 0


def is_expert(view: ModelView, name: RuntimeName, path: str) -> bool:
    """Whether a tensor is (part of) a stacked parameter of experts."""
    from torch import nn

    key, module = name.key or "", view.modules[path]
    stack = view.state[key].ndim == 3 and key in view.parameters and not isinstance(module, nn.modules.conv._ConvNd)
    return stack and "expert" in f"{key} {type(module).__name__}".lower()


def find_expert(view: ModelView, name: RuntimeName, path: str, shape: tuple[int, ...]) -> Expert | None:
    """The place of a tensor of experts; None where transformers rearranges it in a way that no matrix survives."""
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
    """A stacked tensor that transformers transposes, always or only where its shape is not the model's."""
    steps = conversion.operations
    if len(steps) != 1 or type(steps[0]).__name__ != "Transpose" or {steps[0].dim0, steps[0].dim1} != {1, 2}:
        return None
    turned = not steps[0].check_dims or shape != expected
    if expected != ((shape[0], shape[2], shape[1]) if turned else shape):
        return None
    return Expert(0, shape[0], stacked=True, transposed=transposed != turned)
