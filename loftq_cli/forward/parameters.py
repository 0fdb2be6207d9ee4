"""Set and clear a model's parameters and buffers by their names on disk, keeping ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from loftq_cli.forward.weights import Weights
from loftq_cli.modules.experts import Expert
from loftq_cli.modules.names import RuntimeName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Share:
    """A tensor's part in a parameter of experts: the expert, and whether the two have opposite orientations."""

    expert: Expert
    transposed: bool


class Parameters:
    """Maps a checkpoint's tensors to the parameters of a model without weights.

    Args:
        experts: the tensors that transformers stacks, joins or transposes into a parameter of experts.

    Attributes:
        keys: name on disk -> parameter name, for every tensor that is one parameter (or buffer) of the model, or an
            expert's part of one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Mapping[str, RuntimeName],
        experts: Mapping[str, Share],
        device: torch.device,
    ) -> None:
        self._model, self._experts, self._device = model, experts, device
        known_names = {name for name, place in names.items() if not place.merged} | experts.keys()
        self.keys = {name: place.key for name, place in names.items() if place.key and name in known_names}
        entries = _entries(model)
        self._empty = {key: entries[key] for key in self.keys.values()}
        same: dict[int, tuple[str, ...]] = {}
        for key, value in entries.items():
            same[id(value)] = (*same.get(id(value), ()), key)
        self._aliases = {key: same[id(entries[key])] for key in self.keys.values()}
        known = {alias for aliases in self._aliases.values() for alias in aliases}
        for key, value in entries.items():
            if value.is_meta and key not in known:  # a layer without weights in the checkpoint
                self._put_one(key, _zeros(value.shape).to(device))
            elif not value.is_meta:
                self._put_one(key, value.to(device))

    def within(self, path: str) -> list[str]:
        """Return the names of the tensors that belong only to the module at `path`."""
        inside = f"{path}."
        return [name for name, key in self.keys.items() if all(k.startswith(inside) for k in self._aliases[key])]

    def zeros(self) -> Weights:
        """Return zeros for every tensor, which take no memory."""
        return _Zeros({name: self._shape(name) for name in self.keys})

    def outside(self, path: str) -> dict[str, Tensor]:
        """Return the tensors that the model uses outside of the module at `path`, by name; tied ones too."""
        inside = f"{path}."
        used = (name for name, key in self.keys.items() if not all(k.startswith(inside) for k in self._aliases[key]))
        return {name: self._get(self.keys[name]) for name in used}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Use tensors that `outside` returned."""
        for name, value in tensors.items():
            self._put(self.keys[name], value)

    def fill(self, names: Iterable[str], weights: Weights, shared: Mapping[str, Tensor] = NOTHING) -> None:
        """Read tensors into the model: floating-point ones as float32, integers unchanged.

        Args:
            shared: tensors by name that are used in place of equal ones of `weights`.
        """
        stacks: dict[str, Tensor] = {}
        for name in names:
            value, key = weights.read(name), self.keys[name]
            value = value.to(self._device, torch.float32) if value.is_floating_point() else value.to(self._device)
            share, same = self._experts.get(name), shared.get(name)
            if share is None:
                self._put(key, same if same is not None and torch.equal(same, value) else value)
            elif share.expert.stacked:
                self._put(key, value.mT.contiguous() if share.transposed else value)
            else:
                if key not in stacks:
                    stacks[key] = torch.zeros(self._empty[key].shape, device=self._device)
                begin = share.expert.part * len(value)
                stacks[key][share.expert.index, begin : begin + len(value)] = value
        for key, stack in stacks.items():
            self._put(key, stack)

    def clear(self, names: Iterable[str]) -> None:
        """Remove tensors from the model."""
        for name in names:
            self._put(self.keys[name], self._empty[self.keys[name]])

    def _shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor on disk."""
        whole, share = self._empty[self.keys[name]].shape, self._experts.get(name)
        if share is None:
            return whole
        if share.expert.stacked:
            return torch.Size((whole[0], whole[2], whole[1])) if share.transposed else whole
        return torch.Size((whole[1] // share.expert.parts, *whole[2:]))

    def _get(self, key: str) -> Tensor:
        path, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(path)
        parameter = module._parameters.get(leaf)
        found = module._buffers.get(leaf) if parameter is None else parameter.data
        assert found is not None
        return found

    def _put(self, key: str, value: Tensor) -> None:
        for alias in self._aliases[key]:
            self._put_one(alias, value)

    def _put_one(self, key: str, value: Tensor) -> None:
        path, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


class LoadedParameters(Parameters):
    """Of a model that has its weights already: nothing is read into it."""

    def __init__(self) -> None:
        self.keys = {}


@dataclass(frozen=True)
class _Zeros:
    """Implements `Weights`."""

    shapes: Mapping[str, torch.Size]

    @property
    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def read(self, name: str) -> Tensor:
        return _zeros(self.shapes[name])


def _zeros(shape: torch.Size) -> Tensor:
    """Return float32 zeros; pages that are never written take no memory."""
    return torch.from_numpy(np.zeros(tuple(shape), np.float32))


def _entries(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
