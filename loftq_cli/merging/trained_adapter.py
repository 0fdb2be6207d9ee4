"""Read a trained adapter as PEFT's `save_pretrained` writes it: the modules it changes, and their factors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.modules.experts import Expert
from loftq_cli.numerics.methods.qalora import peft_constant, widened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")

# Settings that change the model other than by adding B @ A to a weight.
_OTHER = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "trained biases",
    "modules_to_save": "modules trained as a whole (modules_to_save)",
    "trainable_token_indices": "trained tokens",
}


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
    """

    folder: Path
    config: dict[str, Any]
    keys: dict[str, dict[str, str]]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.keys)

    @property
    def group(self) -> int:
        return int(self.config["qalora_group_size"]) if self.config.get("use_qalora") else 1

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape [out, in / group] of the update."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a, b = (file.get_slice(self.keys[module][factor]).get_shape() for factor in "AB")
        return (a[1], b[0]) if "lora_embedding" in self.keys[module]["A"] else (b[0], a[1])

    def rank(self, path: str) -> int:
        """Return the rank; for experts, of all together.

        Raises:
            LoftqError: A and B have different ranks.
        """
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a, b = (file.get_slice(self.keys[path][factor]).get_shape() for factor in "AB")
        if a[0] != b[1]:
            raise LoftqError(
                f"the adapter's factors for {path} have ranks {a[0]} and {b[1]}, which must be equal: save it again."
            )
        return int(a[0])

    def targets(self, parameter: str) -> bool:
        """True if PEFT adapts a bare parameter; the config may name it by a suffix or with a prefix."""
        named = self.config.get("target_parameters") or ()
        return any(
            name == parameter or parameter.endswith(f".{name}") or name.endswith(f".{parameter}") for name in named
        )

    def compact(self, place: Place, in_features: int) -> Tensor:
        """Return the update in float32 [out, in / group]: it is constant within groups."""
        a, b = self._factors(place)
        constant = self._scaling(place.name)
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
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(keys["A"]).float(), opened.get_tensor(keys["B"]).float()
        with safe_open(file, framework="pt") as opened:
            whole = opened.get_slice(keys["A"])
            rank = whole.get_shape()[0] // expert.count
            a = whole[expert.index * rank : (expert.index + 1) * rank].float()
        b = _shared(file, file.stat().st_mtime_ns, keys["B"])
        height = b.shape[0] // expert.parts
        rows = b[expert.part * height : (expert.part + 1) * height]
        return a, rows.unflatten(1, (rank, expert.count))[:, :, expert.index].float()

    def _scaling(self, name: str) -> float:
        """Return lora_alpha / r with PEFT's patterns, whose keys match a path or its end."""
        rank = _matching(self.config.get("rank_pattern"), name, self.config["r"])
        alpha = _matching(self.config.get("alpha_pattern"), name, self.config["lora_alpha"])
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)


@lru_cache(maxsize=2)  # checkpoints store gate, down and up expert by expert
def _shared(file: Path, changed: int, key: str) -> Tensor:
    """Return a factor that all experts share; cached by the file's modification time."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def read_adapter(folder: Path) -> TrainedAdapter:
    """Open an adapter.

    Raises:
        LoftqError: it is not an adapter, damaged, or does more than add B @ A to weights.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise LoftqError(f"{folder} holds no {CONFIG} and {WEIGHTS}: give a folder that PEFT's save_pretrained wrote.")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = list(file.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise LoftqError(f"the adapter in {folder} is damaged ({error}): save it again.") from error
    _check_kind(folder, config)
    keys: dict[str, dict[str, str]] = {}
    for name in names:
        if ".base_layer." in name and ".lora_" not in name:  # PEFT saves the frozen table beside an embedding's factors
            continue
        match = _KEY.match(name)
        if match is None:
            raise LoftqError(
                f"the adapter in {folder} holds {name}, which is not a LoRA factor: loftq cannot merge it."
            )
        keys.setdefault(match["module"], {})[match["factor"]] = name
    if not keys or any(set(factors) != {"A", "B"} for factors in keys.values()):
        raise LoftqError(f"the adapter in {folder} has incomplete factors: save it again.")
    return TrainedAdapter(folder, config, keys)


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoftqError(f"the adapter in {folder} is of PEFT's type {kind}: loftq merges only LORA.")
    found = next((what for name, what in _OTHER.items() if config.get(name)), None)
    if found is None and config.get("bias", "none") != "none":
        found = _OTHER["lora_bias"]
    if found:
        raise LoftqError(
            f"the adapter in {folder} has {found}, which cannot be added to a weight: loftq cannot merge it."
        )


def _matching(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
