"""Unpack parameters that become dense while they are loaded: experts, and others that PEFT adapts as parameters.

transformers uses `WeightConverter`s to turn names on disk into parameters (one matrix per expert -> one stacked
parameter). Those that create a packed parameter are extended here: they also collect the scales and unpack first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from loftq_cli.errors import LoftqError
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.runtime.decode import decode_rows
from loftq_cli.runtime.paths import find_path

# Suffixes that turn the name of codes into the name of their scales: for a module's weight, and for a bare parameter.
_SCALES = ("_absmax", ".absmax")


@dataclass(frozen=True)
class PackedParameter:
    """A parameter [..., out, in], or [..., in, out] if `transposed`, that is stored as rows of `in_features` codes;
    `name` is its path in the class that the checkpoint was converted with."""

    name: str
    grid: BlockGrid | TrellisGrid
    in_features: int
    transposed: bool


class Unpacking:
    """The conversions of one model while it is loaded."""

    def __init__(self, parameters: Sequence[PackedParameter], prefix: str, quantizer: Any) -> None:
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._prefix = prefix
        self._quantizer = quantizer
        # Our conversion and the original one; None for conversions that exist only because of packing.
        self._originals: list[tuple[Any, Any | None]] = []

    def extend(self, conversions: Sequence[Any]) -> list[Any]:
        """Return `conversions`, extended to unpack first if they create packed parameters, and one more conversion for
        each kind of parameter that transformers loads unchanged."""
        if not self._parameters:
            return list(conversions)
        extended = [self._unpacking(conversion) for conversion in conversions]
        bodies = dict.fromkeys(self._pattern(name) for name in self._parameters)
        for body in bodies:
            scales = {f"({body})": [f"({body}){re.escape(suffix)}" for suffix in _SCALES]}
            sources = [name for own, others in scales.items() for name in (own, *others)]
            made = WeightConverter(sources, r"\1", [self._operation(scales, first=False)])
            self._originals.append((made, None))
            extended.append(made)
        return extended

    def restore(self, used: Sequence[Any]) -> list[Any]:
        """Return the conversions that a later `save_pretrained` must reverse."""
        restored = []
        for conversion in used:
            known = next((original for ours, original in self._originals if ours is conversion), conversion)
            restored += [] if known is None else [known]
        return restored

    def _unpacking(self, conversion: Any) -> Any:
        if not isinstance(conversion, WeightConverter) or not self._makes_packed(conversion):
            return conversion
        scales = {source: [source + suffix for suffix in _SCALES] for source in conversion._original_source_patterns}
        sources = [name for own, others in scales.items() for name in (own, *others)]
        targets = conversion._original_target_patterns
        operations = [self._operation(scales, first=True), *conversion.operations]
        ours = conversion.copy(list(sources), list(targets), operations=operations)
        self._originals.append((ours, conversion))
        return ours

    def _operation(self, scales: Mapping[str, list[str]], *, first: bool) -> Unpack:
        return Unpack(self._parameters, self._prefix, self._quantizer, scales, first)

    def _makes_packed(self, conversion: WeightConverter) -> bool:
        return any(target in name for target in conversion.target_patterns for name in self._parameters)

    def _pattern(self, name: str) -> str:
        """Return a regex for the parameter in every layer; the base model's prefix may be missing on disk."""
        body = re.escape(name.removeprefix(f"{self._prefix}.") if self._prefix else name)
        return r"(?:^|\.)" + re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", body)


class Unpack(ConversionOps):
    """Convert codes and scales to dense tensors in the parameter's dtype; tensors that are not packed are only cast.

    Args:
        parameters: every packed parameter by name.
        scales: name pattern of codes -> name patterns of their scales.
        first: other operations follow.
    """

    def __init__(
        self,
        parameters: Mapping[str, PackedParameter],
        prefix: str,
        quantizer: Any,
        scales: Mapping[str, list[str]],
        first: bool,
    ) -> None:
        self._parameters, self._prefix, self._scales, self._first = parameters, prefix, scales, first
        # With this attribute set, transformers does not change the dtype of the operation's inputs.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        """Return the operation itself: transformers copies operations for every tensor, and this one has no state."""
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        dtype = model.get_parameter(full_layer_name).dtype
        found = find_path(full_layer_name, self._parameters, self._prefix)
        unpacked = {}
        for codes, scales in self._scales.items():
            if codes not in input_dict:
                continue
            absmax = iter([tensor for name in scales for tensor in _tensors(input_dict.get(name, []))])
            tensors = _tensors(input_dict[codes])
            if any(tensor.dtype == torch.uint8 for tensor in tensors) and found is None:
                raise LoftqError(
                    f"{full_layer_name} is packed, but config.json does not describe its packing: convert the model "
                    "again."
                )
            unpacked[codes] = [
                self._dense(tensor, next(absmax), self._parameters[found or ""], dtype)
                if tensor.dtype == torch.uint8
                else tensor.to(dtype)
                for tensor in tensors
            ]
        # Later operations identify their input by its pattern; if there are none, the result is the parameter itself.
        return unpacked if self._first else {full_layer_name: next(iter(unpacked.values()))}

    def _dense(self, codes: Tensor, absmax: Tensor, parameter: PackedParameter, dtype: torch.dtype) -> Tensor:
        if codes.ndim > 2 and isinstance(parameter.grid, TrellisGrid):  # whose rows depend on others of their matrix
            pairs = zip(codes.flatten(0, -3), absmax.flatten(0, -3))
            dense = torch.cat([self._rows(*pair, parameter, dtype) for pair in pairs])
        else:
            dense = self._rows(codes.flatten(0, -2), absmax.flatten(0, -2), parameter, dtype)
        dense = dense.unflatten(0, codes.shape[:-1])
        return dense.transpose(-1, -2).contiguous() if parameter.transposed else dense

    @staticmethod
    def _rows(codes: Tensor, absmax: Tensor, parameter: PackedParameter, dtype: torch.dtype) -> Tensor:
        return decode_rows(codes, absmax, None, parameter.grid, parameter.in_features, dtype)


def _tensors(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]
