"""Read a trained adapter as PEFT's `save_pretrained` writes it: the modules it changes, and their factors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.artifacts import tensor_reader
from loftq_cli.checkpoint import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.merging.adapter_config import CONFIG, AdapterConfig, read_config
from loftq_cli.modules.experts import Expert
from loftq_cli.numerics.methods.qalora import peft_constant, widened

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE = ".base_layer."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")
_ROWS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.\w+)?$")


@dataclass(frozen=True)
class Place:
    """Where an adapter keeps the factors of one matrix.

    Attributes:
        path: of the factors in the file, a key of `TrainedAdapter.keys`.
        name: PEFT's name of the module or parameter, which patterns in the config match.
        expert: the expert, if all experts of a parameter share their factors; None for a module.
    """

    path: str
    name: str
    expert: Expert | None = None


@dataclass(frozen=True)
class TrainedAdapter:
    """A LoRA or QA-LoRA adapter on disk; factors are read on demand.

    Attributes:
        modules: paths of the modules it changes, in the order of the file.
        group: inputs that are pooled together (QA-LoRA); 1 if none are.
        infos: dtype and shape of every tensor in the file.
        wholes: parameter → its tensor in the file, for parameters that are saved as a whole.
        rows: module → its trained rows in the file, for tables of which only some tokens were trained.
    """

    folder: Path
    config: AdapterConfig
    keys: dict[str, dict[str, str]]
    infos: dict[str, TensorInfo]
    wholes: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.keys)

    @property
    def group(self) -> int:
        return self.config.group

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape [out, in / group] of the update."""
        a, b = (self.infos[self.keys[module][factor]].shape for factor in "AB")
        return (a[1], b[0]) if "lora_embedding" in self.keys[module]["A"] else (b[0], a[1])

    def rank(self, path: str) -> int:
        """Return the rank; for experts, of all together.

        Raises:
            LoftqError: A and B have different ranks.
        """
        a, b = (self.infos[self.keys[path][factor]].shape for factor in "AB")
        if a[0] != b[1]:
            raise LoftqError(
                f"the adapter's factors for {path} have ranks {a[0]} and {b[1]}, which must be equal: save it again."
            )
        return int(a[0])

    def targets(self, parameter: str) -> bool:
        """True if PEFT adapts a bare parameter; the config may name it by a suffix or with a prefix."""
        return any(
            name == parameter or parameter.endswith(f".{name}") or name.endswith(f".{parameter}")
            for name in self.config.parameters
        )

    def tensor(self, key: str) -> Tensor:
        """Read a tensor of the file."""
        return tensor_reader.read_tensor(self.folder / WEIGHTS, self.infos[key])

    def compact(self, place: Place, in_features: int) -> Tensor:
        """Return the update in float32 [out, in / group]: it is constant within groups."""
        a, b = self._factors(place)
        constant = self.config.scaling_of(place.name)
        if self.group > 1:
            constant *= peft_constant(in_features, self.group)
        # An embedding's factors are stored transposed; for a table [vocabulary, width] "in" is the width.
        product = (b @ a).T if "lora_embedding" in self.keys[place.path]["A"] else b @ a
        return product * constant

    def update(self, place: Place, in_features: int) -> Tensor:
        """Return the update in float32 [out, in]."""
        compact = self.compact(place, in_features)
        return compact if self.group == 1 else widened(compact, self.group)

    def _factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r] in float32.

        Experts share A [experts * r, in] and B [outs, r * experts], in which the expert index varies fastest; each part
        of the outputs, gate or up, has its own rows.
        """
        file, keys, expert = self.folder / WEIGHTS, self.keys[place.path], place.expert
        if expert is None:
            return self.tensor(keys["A"]).float(), self.tensor(keys["B"]).float()
        info = self.infos[keys["A"]]
        rank = info.shape[0] // expert.count
        a = tensor_reader.read_tensor(file, info, expert.index * rank, (expert.index + 1) * rank).float()
        b = _shared(file, file.stat().st_mtime_ns, self.infos[keys["B"]])
        height = b.shape[0] // expert.parts
        rows = b[expert.part * height : (expert.part + 1) * height]
        return a, rows.unflatten(1, (rank, expert.count))[:, :, expert.index].float()


@lru_cache(maxsize=2)  # checkpoints store gate, down and up expert by expert
def _shared(file: Path, changed: int, info: TensorInfo) -> Tensor:
    """Return a factor that all experts share; cached by the file's modification time."""
    return tensor_reader.read_tensor(file, info)


def read_adapter(folder: Path) -> TrainedAdapter:
    """Open an adapter, and check that all of its numbers are finite.

    Raises:
        LoftqError: it is not an adapter, damaged, or does more than add B @ A to weights and replace whole tensors.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise LoftqError(f"{folder} holds no {CONFIG} and {WEIGHTS}: give a folder that PEFT's save_pretrained wrote.")
    config = read_config(folder)
    infos = dict(tensor_reader.tensors_of(folder / WEIGHTS))
    keys: dict[str, dict[str, str]] = {}
    wholes: dict[str, str] = {}
    rows: dict[str, str] = {}
    for name in infos:
        if match := _KEY.match(name):
            keys.setdefault(match["module"], {})[match["factor"]] = name
        elif match := _ROWS.match(name):
            rows[match["module"].replace(_BASE.rstrip("."), "")] = name
        elif ".lora_" in name or not name.startswith(_PREFIX):
            raise LoftqError(
                f"the adapter in {folder} holds {name!r:.200}, which is not a LoRA factor: loftq cannot merge it."
            )
        else:
            parameter = name.removeprefix(_PREFIX).replace(_BASE, ".")
            if parameter in wholes:
                raise LoftqError(f"the adapter in {folder} holds {parameter!r:.200} twice: save it again.")
            wholes[parameter] = name
    if not (keys or wholes or rows) or any(set(factors) != {"A", "B"} for factors in keys.values()):
        raise LoftqError(f"the adapter in {folder} has incomplete factors: save it again.")
    trained = TrainedAdapter(folder, config, keys, infos, wholes, rows)
    _check_tensors(trained)
    return trained


def _check_tensors(trained: TrainedAdapter) -> None:
    """Raise unless factors and rows are matrices of floating-point numbers, and all numbers are finite."""
    matrices = {name for factors in trained.keys.values() for name in factors.values()} | set(trained.rows.values())
    for name, info in trained.infos.items():
        if name in matrices and (len(info.shape) != 2 or not info.dtype.is_floating_point or 0 in info.shape):
            raise LoftqError(
                f"{name} in {trained.folder / WEIGHTS} has dtype {info.dtype} and shape {list(info.shape)}, but must "
                "be a floating-point matrix: save the adapter again."
            )
    for name, info in trained.infos.items():
        if info.dtype.is_floating_point and not torch.isfinite(trained.tensor(name).float()).all():
            raise LoftqError(f"{name} in {trained.folder / WEIGHTS} contains NaN or infinity: train the adapter again.")
