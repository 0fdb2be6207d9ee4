"""Packed weight as a parameter that cannot be mistaken for a dense one.

PEFT merges an adapter by adding to `base_layer.weight.data`, or to a clone of it. On packed bytes that is a confusing
shape error at best; at 8 bits, where a row has as many bytes as columns, it would silently destroy the codes. Tensors
obtained through `module.weight` therefore refuse arithmetic, with one sentence that explains what to do.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from loftq_cli.errors import LoftqError

_REFUSAL = "this layer's weight is packed, so nothing can be added to it: call `model.dequantize()` first, then merge."
_REFUSED = (
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__",
    "mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__",
)  # fmt: skip

_DATA: Any = torch._C.TensorBase.__dict__["data"]


def _refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise LoftqError(_REFUSAL)


class _NoArithmetic:
    """Mixin: every operation that adds to the tensor or scales it raises LoftqError."""


for _name in _REFUSED:
    setattr(_NoArithmetic, _name, _refuse)


class _CodesView(_NoArithmetic, Tensor):
    """The tensor that `weight.data` returns; a clone keeps refusing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse `torch.mul(weight.data, ...)` too; any other operation returns a plain tensor."""
        if func.__name__ in _REFUSED:
            _refuse()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def clone(self, **kwargs: Any) -> _CodesView:
        return super().clone(**kwargs).as_subclass(_CodesView)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class PackedCodes(_NoArithmetic, nn.Parameter):
    """A uint8 parameter that refuses arithmetic. Copies and pickles are plain parameters: no file names this class."""

    @property
    def data(self) -> Tensor:
        return _DATA.__get__(self).as_subclass(_CodesView)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != torch.uint8:
            _refuse()
        _DATA.__set__(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), requires_grad=False).__reduce_ex__(protocol)


def guard(weight: Tensor) -> Tensor:
    """Turn a plain tensor or parameter into a `PackedCodes` in place, so that ties and references stay valid.

    Loaders, copies and offloading put plain parameters into the module; sharded ones (DTensor) are not changed.
    """
    if type(weight) in (nn.Parameter, Tensor):
        weight.__class__ = PackedCodes
    return weight
