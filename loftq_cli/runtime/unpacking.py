"""Packed parameters that become dense while they are loaded: experts, and what else PEFT adapts as a parameter.

transformers turns names on disk into parameters by `WeightConverter`s (one matrix an expert -> one stacked parameter).
The ones that make a packed parameter also collect the scales here, and unpack before they do anything else.
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
from loftq_cli.runtime.decode import decode_rows
from loftq_cli.runtime.paths import find_path

# What follows the name of the codes in the name of their scales: of a module's weight, and of a bare parameter.
_SCALES = ("_absmax", ".absmax")


@dataclass(frozen=True)
class PackedParameter:
    """A parameter [..., out, in], or where `transposed` [..., in, out], that is stored as rows of `in_features` codes;
    `name` is its path in the class the checkpoint was converted with."""

    name: str
    grid: BlockGrid
    in_features: int
    transposed: bool


class Unpacking:
    """The conversions of one model while it is loaded."""

    def __init__(self, parameters: Sequence[PackedParameter], prefix: str, quantizer: Any) -> None:
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._prefix = prefix
        self._quantizer = quantizer
        # Ours -> the one it stands for; None for conversions that there would not be without packing.
        self._originals: list[tuple[Any, Any | None]] = []

    def extend(self, conversions: Sequence[Any]) -> list[Any]:
        """`conversions` with those that make packed parameters unpacking first; then one for each kind of parameter
        that transformers loads as it is."""
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
        """The conversions a later `save_pretrained` has to undo."""
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
        """A regex for the parameter in every layer; the base model's prefix may be missing on disk."""
        body = re.escape(name.removeprefix(f"{self._prefix}.") if self._prefix else name)
        return r"(?:^|\.)" + re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", body)


class Unpack(ConversionOps):
    """Codes and scales -> dense tensors in the parameter's dtype; what is not packed is only cast.

    Args:
        parameters: every packed parameter by name.
        scales: pattern of the names of codes -> patterns of the names of their scales.
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
        # transformers leaves the dtype of what such an operation takes alone.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        """transformers copies operations for every tensor; there is nothing in this one that changes."""
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
                raise LoftqError(f"{full_layer_name} is packed but config.json does not tell how: convert it again.")
            unpacked[codes] = [
                self._dense(tensor, next(absmax), self._parameters[found or ""], dtype)
                if tensor.dtype == torch.uint8
                else tensor.to(dtype)
                for tensor in tensors
            ]
        # Later operations know their input by its pattern; without any, this is the parameter itself.
        return unpacked if self._first else {full_layer_name: next(iter(unpacked.values()))}

    def _dense(self, codes: Tensor, absmax: Tensor, parameter: PackedParameter, dtype: torch.dtype) -> Tensor:
        rows = codes.flatten(0, -2), absmax.flatten(0, -2)
        dense = decode_rows(*rows, None, parameter.grid, parameter.in_features, dtype)
        dense = dense.unflatten(0, codes.shape[:-1])
        return dense.transpose(-1, -2).contiguous() if parameter.transposed else dense


def _tensors(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]
