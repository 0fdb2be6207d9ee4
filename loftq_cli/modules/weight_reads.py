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
from typing import TYPE_CHECKING, Any

from loftq_cli.modules.keep_rules import HIDDEN_READS, READ_ONLY_WHEN

if TYPE_CHECKING:
    from torch import nn

# Methods that run while a model is set up or resized, and accessors that no forward pass calls (Qwen2-VL's tower).
_SETUP = re.compile(r"_*(init|tie|reset|set_|resize|get_resized|get_dtype|get_device|post_init)")

# Code that checks these handles packed weights: `!= torch.uint8`, `(target_dtype := ...).is_floating_point`.
_GUARDS = ("torch.uint8", "dtype).is_floating_point", "dtype.is_floating_point")

# Attributes that are still correct on a packed weight.
_HARMLESS = ("device", "requires_grad", "is_cuda", "is_meta")


Step = str | int | None  # attribute name, index into a container, or any index


@dataclass(frozen=True)
class Read:
    """A `.weight` in the source of a class.

    Attributes:
        steps: the path from `self` to the module.
        dtype_only: the code asks for its dtype or its type, and not for its values.
    """

    steps: tuple[Step, ...]
    dtype_only: bool


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
        for steps in weight_reads(reader) - dtype_reads(reader):
            for target in _walk(module, steps):
                found.setdefault(f"{path}.{target}".lstrip("."), reader.__name__)
        for pattern in HIDDEN_READS.get(reader.__name__, ()):
            hits = (name for name, _ in module.named_modules() if re.fullmatch(pattern, name))
            found.update((f"{path}.{name}".lstrip("."), reader.__name__) for name in hits)
    return found


def weight_dtype_reads(model: nn.Module) -> dict[str, str]:
    """Find the modules of whose `.weight` other code reads the dtype alone: T5 casts activations to `wo.weight.dtype`.

    The weight may be stored in any way, as long as the layer has a `weight` with the right dtype.

    Returns:
        Module path -> name of the class whose code reads the dtype.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for steps in dtype_reads(type(module)):
            for target in _walk(module, steps):
                found.setdefault(f"{path}.{target}".lstrip("."), type(module).__name__)
    return found


def weight_reads(cls: type[nn.Module]) -> frozenset[tuple[Step, ...]]:
    """Return the paths from `self` to every `.weight` that methods of `cls` read: `("wo",)` for `self.wo.weight.dtype`.

    Methods that set a model up are skipped, and so are methods that check for packed weights. A class without
    available source is assumed to read none.
    """
    return frozenset(read.steps for read in _reads(cls))  # type: ignore[arg-type]  # classes hash, mypy doubts it


def dtype_reads(cls: type[nn.Module]) -> frozenset[tuple[Step, ...]]:
    """Return the part of `weight_reads` of which only the dtype is read, everywhere in `cls`."""
    reads = _reads(cls)  # type: ignore[arg-type]  # classes hash, mypy doubts it
    return frozenset(read.steps for read in reads) - frozenset(read.steps for read in reads if not read.dtype_only)


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
    types_asked = {id(call.args[0]) for call in calls if ast.unparse(call.func) == "isinstance"}
    dtypes_asked = {id(node.value) for node in attributes if node.attr == "dtype"}
    for node in attributes:
        if node.attr == "weight" and id(node) not in harmless and (steps := _steps(node.value)):
            yield Read(steps, dtype_only=id(node) in types_asked | dtypes_asked)


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
