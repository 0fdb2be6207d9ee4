"""Find weights that the code of another module reads directly, from the source of every class."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from loftq_cli.modules.keep_rules import HIDDEN_READS, READ_ONLY_WHEN

if TYPE_CHECKING:
    from torch import nn

# Methods that run while a model is set up or resized, and accessors that no forward pass calls (Qwen2-VL's tower).
_SETUP = re.compile(r"_*(init|tie|reset|set_|resize|get_resized|get_dtype|get_device|post_init)")

# Code that checks these handles packed weights: `!= torch.uint8`, `(target_dtype := ...).is_floating_point`.
_GUARDS = ("torch.uint8", "dtype).is_floating_point", "dtype.is_floating_point")

# The flag that transformers sets in the config of a model with a quantizer (5.23, `quantizers.base`).
_QUANTIZED = re.compile(r"hasattr\([\w.]*config, '_is_quantized'\)")

# Attributes that are still correct on a packed weight.
_HARMLESS = ("device", "requires_grad", "is_cuda", "is_meta")


Step = str | int | None  # attribute name, index into a container, or any index


class ReadKind(Enum):
    """What the code does with a weight that it reads."""

    VALUES = "uses its values"
    UNQUANTIZED = "uses its values unless the model is quantized (`config._is_quantized`)"
    DTYPE = "asks for its dtype or its type"


@dataclass(frozen=True)
class Read:
    """A `.weight` in the source of a class; `steps` is the path from `self` to the module."""

    steps: tuple[Step, ...]
    kind: ReadKind


def direct_weight_reads(model: nn.Module, config: Any) -> dict[str, str]:
    """Find the modules whose `.weight` is used by the code of another module instead of through their own forward.

    Such a weight must stay a plain floating-point tensor, and an adapter on the module would not reach that code:
    Mamba passes `out_proj.weight` to its CUDA kernel, `nn.MultiheadAttention` passes `out_proj.weight` to a function.
    The reads are found in the source of every class in the model, so no list of architectures is needed.

    Args:
        model: any model, also on the meta device.
        config: its config; only the switches named in `READ_ONLY_WHEN` are used.

    Returns:
        Module path -> name of the class whose code reads the weight.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        reader = type(module)
        switch = READ_ONLY_WHEN.get(reader.__name__)
        if switch is not None and not getattr(config, switch, False):
            continue
        for steps in weight_reads(reader, ReadKind.VALUES):
            for target in _walk(module, steps):
                found.setdefault(f"{path}.{target}".lstrip("."), reader.__name__)
        for pattern in HIDDEN_READS.get(reader.__name__, ()):
            hits = (name for name, _ in module.named_modules() if re.fullmatch(pattern, name))
            found.update((f"{path}.{name}".lstrip("."), reader.__name__) for name in hits)
    return found


def partial_weight_reads(model: nn.Module, kind: ReadKind) -> dict[str, str]:
    """Find the modules whose `.weight` other code reads in a way that some packed layers can satisfy.

    T5 casts activations to `wo.weight.dtype` (`DTYPE`): the weight may be stored in any way, as long as the layer has a
    `weight` with the right dtype. Jamba uses `dt_proj.weight` only in a model without a quantizer (`UNQUANTIZED`).

    Returns:
        Module path -> name of the class whose code reads the weight; as in `direct_weight_reads`.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for steps in weight_reads(type(module), kind):
            for target in _walk(module, steps):
                found.setdefault(f"{path}.{target}".lstrip("."), type(module).__name__)
    return found


def weight_reads(cls: type[nn.Module], kind: ReadKind | None = None) -> frozenset[tuple[Step, ...]]:
    """Return the paths from `self` to every `.weight` that methods of `cls` read: `("wo",)` for `self.wo.weight.dtype`.

    Methods that set a model up are skipped, and so are methods that check for packed weights. A class without
    available source is assumed to read none.

    Args:
        kind: only reads of this kind.
    """
    reads = _reads(cls)  # type: ignore[arg-type]  # classes hash, mypy doubts it
    return frozenset(read.steps for read in reads if kind is None or read.kind is kind)


@functools.cache
def _reads(cls: type[nn.Module]) -> frozenset[Read]:
    return frozenset(read for function in _methods(cls) for read in _reads_in(function))


def _methods(cls: type) -> Iterator[types.FunctionType]:
    """Yield the methods of `cls`, own and inherited, that mention `weight`."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        member = member.fget if isinstance(member, property) else member
        function = inspect.unwrap(member) if callable(member) else None
        if not isinstance(function, types.FunctionType) or _SETUP.match(name):
            continue
        # The base classes' bookkeeping (loading, saving, hooks) is not part of a forward pass.
        bookkeeping = not function.__module__.startswith(("transformers.models.", "torch.nn.modules."))
        if not bookkeeping and "weight" in _names(function.__code__):
            yield function


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield every attribute and global that a function, or a function nested in it, uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _reads_in(function: types.FunctionType) -> Iterator[Read]:
    """Yield every `.weight` in the source of one function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    if any(ast.unparse(node).endswith(_GUARDS) for node in attributes):
        return
    harmless = {id(node.value) for node in attributes if node.attr in _HARMLESS}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    asked = {id(call.args[0]) for call in calls if ast.unparse(call.func) == "isinstance"}
    asked |= {id(node.value) for node in attributes if node.attr == "dtype"}
    unquantized = set(_ids_without_quantizer(tree))
    for node in attributes:
        if node.attr != "weight" or id(node) in harmless or not (steps := _steps(node.value)):
            continue
        if id(node) in unquantized:
            kind = ReadKind.UNQUANTIZED
        else:
            kind = ReadKind.DTYPE if id(node) in asked else ReadKind.VALUES
        yield Read(steps, kind)


def _ids_without_quantizer(tree: ast.AST) -> Iterator[int]:
    """Yield the ids of the nodes that run only without a quantizer: `else` of `if hasattr(config, "_is_quantized")`."""
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and _QUANTIZED.fullmatch(ast.unparse(branch.test)):
            yield from (id(node) for statement in branch.orelse for node in ast.walk(statement))


def _steps(node: ast.expr) -> tuple[Step, ...]:
    """Convert `self.a.b[0].c` to ("a", "b", 0, "c"); empty if the expression does not start at `self`."""
    if isinstance(node, ast.Attribute):
        before: tuple[Step, ...] = _steps(node.value)
        starts = isinstance(node.value, ast.Name) and node.value.id == "self"
        return (*before, node.attr) if before or starts else ()
    if isinstance(node, ast.Subscript) and (before := _steps(node.value)):
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        return (*before, index if isinstance(index, int) else None)
    return ()


def _walk(module: nn.Module, steps: tuple[Step, ...]) -> Iterator[str]:
    """Yield the paths of the modules below `module` that `steps` lead to; none if an attribute is not a module."""
    if not steps:
        yield ""
        return
    children = dict(module.named_children())
    wanted = list(children) if steps[0] is None else [str(steps[0])]
    for name in wanted:
        if name in children:
            for rest in _walk(children[name], steps[1:]):
                yield f"{name}.{rest}".rstrip(".")
