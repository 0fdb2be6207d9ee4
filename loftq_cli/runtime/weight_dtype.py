"""Packed linear layers for models whose code reads a weight's dtype, as T5 does to cast activations.

A packed weight has the dtype of its codes, so `x.to(layer.weight.dtype)` would destroy x. These layers keep the codes
under another name, so that every library sees an ordinary uint8 parameter, and answer for `weight` with a stand-in that
has the dtype, shape and device of the dense weight and refuses every computation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightRenaming

from loftq_cli.errors import LoftqError
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.runtime.linear import LoftqLinear

if TYPE_CHECKING:
    from typing_extensions import Self

_REFUSAL = "this layer's weight is packed, so nothing can be computed with it: call `model.dequantize()` first."
_METHODS = frozenset({"__repr__", "size", "dim", "numel", "nelement", "element_size", "get_device"})
_ATTRIBUTES = frozenset({"dtype", "shape", "device", "layout", "ndim", "itemsize", "requires_grad", "grad", "grad_fn"})


class StandIn(Tensor):
    """A tensor with dtype, shape and device, and without values."""

    # transformers initializes no tensor that has this flag.
    _is_hf_initialized = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """
        Raises:
            LoftqError: `func` needs the values.
        """
        getter = func.__name__ == "__get__"
        name = func.__self__.__name__ if getter else func.__name__
        if not (name in (_ATTRIBUTES if getter else _METHODS) or name.startswith("is_")):
            raise LoftqError(_REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The stand-in itself: `weight.data += delta` is refused too."""
        return self


class DtypeLinear(LoftqLinear):
    """`LoftqLinear` whose `weight` has the dtype that the dense layer's weight would have.

    Args:
        weight_dtype: that dtype when the layer is made; casting the module changes it, as for a dense weight.
    """

    codes_name = "codes"

    def __init__(
        self, in_features: int, out_features: int, bias: bool, grid: Grid, *, weight_dtype: torch.dtype, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, grid, **options)
        self.weight_dtype = weight_dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A stand-in for the dense weight [out, in], or [in, out] in place of a `Conv1D`."""
        shape = (self.in_features, self.out_features) if self.conv1d else (self.out_features, self.in_features)
        one = torch.empty((), dtype=self.weight_dtype, device=self.stored_codes.device)
        return one.expand(shape).as_subclass(StandIn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return super()._apply(fn, recurse)


def renaming(paths: Iterable[str], base_model_prefix: str) -> WeightRenaming | None:
    """Return transformers' conversion of `path.weight` on disk to `path.codes` in the model, None without paths.

    Args:
        base_model_prefix: attribute of the backbone in classes with a head; names on disk may have or lack it.
    """
    names = []
    for path in paths:
        names += [path, path.removeprefix(f"{base_model_prefix}.") if base_model_prefix else path]
        names += [f"{base_model_prefix}.{path}"] if base_model_prefix else []
    if not names:
        return None
    alternatives = "|".join(re.escape(name) for name in dict.fromkeys(names))
    return WeightRenaming(rf"^({alternatives})\.weight", r"\1.codes")
