"""The adapter as PEFT loads it: tensors and adapter_config.json in `loftq_init/`, in PEFT 0.21's own layout.

Adapters live in a subfolder because transformers would load an adapter in the root together with the backbone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq_cli.formats.base import OutputTensor

FOLDER = "loftq_init"
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"
CONFIG = f"{FOLDER}/adapter_config.json"


@dataclass(frozen=True)
class AdapterTarget:
    """One adapted matrix: W [out, in] gets lora_b [out, rank] @ lora_a [rank, in]."""

    module: str
    kind: str
    out_features: int
    in_features: int
    rank: int


def adapter_tensors(target: AdapterTarget) -> tuple[OutputTensor, OutputTensor]:
    """Names and shapes of A and B. PEFT keeps an embedding's factors transposed and without `.weight`."""
    prefix = f"base_model.model.{target.module}"
    if target.kind == "embedding":
        return (
            OutputTensor(f"{prefix}.lora_embedding_A", torch.float32, (target.rank, target.out_features)),
            OutputTensor(f"{prefix}.lora_embedding_B", torch.float32, (target.in_features, target.rank)),
        )
    return (
        OutputTensor(f"{prefix}.lora_A.weight", torch.float32, (target.rank, target.in_features)),
        OutputTensor(f"{prefix}.lora_B.weight", torch.float32, (target.out_features, target.rank)),
    )


def encode_adapter(target: AdapterTarget, lora_a: Tensor, lora_b: Tensor, scaling: float) -> dict[str, Tensor]:
    """The tensors by name. PEFT multiplies BA by `scaling`, so B is divided by it."""
    first, second = adapter_tensors(target)
    lora_b = lora_b if scaling == 1.0 else lora_b / scaling
    if target.kind == "embedding":
        return {first.name: lora_b.T.contiguous(), second.name: lora_a.T.contiguous()}
    return {first.name: lora_a.contiguous(), second.name: lora_b.contiguous()}


def decode_factors(target: AdapterTarget, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, without the scaling."""
    first, second = (tensors[tensor.name].float() for tensor in adapter_tensors(target))
    return (first.T, second.T) if target.kind == "embedding" else (second, first)


def decode_adapter(target: AdapterTarget, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """scaling · BA as PEFT applies it, float32 [out, in]."""
    b, a = decode_factors(target, tensors)
    return (b @ a) * scaling


def adapter_config(
    targets: Sequence[AdapterTarget],
    linear_modules: Sequence[str],
    *,
    scaling: float,
    task_type: str | None,
    base_model: str,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """adapter_config.json. Every module is named in full; other ranks than the usual one stand in `rank_pattern`.

    `init_lora_weights` stays true: "loftq" would make PEFT run its own LoftQ over ours.
    """
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    others = {target.module: target.rank for target in targets if target.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(rank * scaling),
        "lora_dropout": 0.0,
        "target_modules": _target_modules([target.module for target in targets], linear_modules),
        "rank_pattern": others,
        "alpha_pattern": {module: _number(other * scaling) for module, other in others.items()},
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(targets: list[str], linear_modules: Sequence[str]) -> list[str] | str:
    """A list matches exact paths and suffixes; where a suffix would also catch another module, one exact regex."""
    chosen = set(targets)
    ambiguous = any(
        module not in chosen and any(module.endswith(f".{target}") for target in targets) for module in linear_modules
    )
    return "|".join(target.replace(".", r"\.") for target in targets) if ambiguous else targets


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
