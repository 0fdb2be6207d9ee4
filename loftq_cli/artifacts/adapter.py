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
from loftq_cli.numerics.qalora import peft_constant, pooled, widened

FOLDER = "loftq_init"
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"
CONFIG = f"{FOLDER}/adapter_config.json"


@dataclass(frozen=True)
class AdapterTarget:
    """One adapted matrix: W [out, in] gets lora_b [out, rank] @ lora_a [rank, in].

    Attributes:
        group: inputs that are pooled before A sees them, so that A is [rank, in / group] (QA-LoRA); 1 for none.
    """

    module: str
    kind: str
    out_features: int
    in_features: int
    rank: int
    group: int = 1

    def constant(self, scaling: float) -> float:
        """What PEFT multiplies BA by."""
        return scaling if self.group == 1 else scaling * peft_constant(self.in_features, self.group)


def adapter_tensors(target: AdapterTarget) -> tuple[OutputTensor, OutputTensor]:
    """Names and shapes of A and B. PEFT keeps an embedding's factors transposed and without `.weight`."""
    prefix = f"base_model.model.{target.module}"
    if target.kind == "embedding":
        return (
            OutputTensor(f"{prefix}.lora_embedding_A", torch.float32, (target.rank, target.out_features)),
            OutputTensor(f"{prefix}.lora_embedding_B", torch.float32, (target.in_features, target.rank)),
        )
    return (
        OutputTensor(f"{prefix}.lora_A.weight", torch.float32, (target.rank, target.in_features // target.group)),
        OutputTensor(f"{prefix}.lora_B.weight", torch.float32, (target.out_features, target.rank)),
    )


def encode_adapter(target: AdapterTarget, lora_a: Tensor, lora_b: Tensor, scaling: float) -> dict[str, Tensor]:
    """The tensors by name. PEFT multiplies BA by a constant, so B is divided by it.

    Args:
        lora_a: float32 [rank, in], equal within groups where inputs are pooled; lora_b: float32 [out, rank].
    """
    first, second = adapter_tensors(target)
    constant = target.constant(scaling)
    lora_b = lora_b if constant == 1.0 else lora_b / constant
    lora_a = lora_a if target.group == 1 else pooled(lora_a, target.group)
    if target.kind == "embedding":
        return {first.name: lora_b.T.contiguous(), second.name: lora_a.T.contiguous()}
    return {first.name: lora_a.contiguous(), second.name: lora_b.contiguous()}


def decode_factors(target: AdapterTarget, tensors: Mapping[str, Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, whose product is what PEFT adds to the weight."""
    first, second = (tensors[tensor.name].float() for tensor in adapter_tensors(target))
    b, a = (first.T, second.T) if target.kind == "embedding" else (second, first)
    constant = target.constant(scaling)
    return b if constant == 1.0 else b * constant, a if target.group == 1 else widened(a, target.group)


def decode_adapter(target: AdapterTarget, tensors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """What PEFT adds to the weight, float32 [out, in]."""
    b, a = decode_factors(target, tensors, scaling)
    return b @ a


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
        **_pooling({target.group for target in targets}),
    }


def _pooling(groups: set[int]) -> dict[str, Any]:
    """PEFT's own fields for QA-LoRA."""
    assert len(groups) == 1, "PEFT has one group size for all"
    (group,) = groups
    return {} if group == 1 else {"use_qalora": True, "qalora_group_size": group}


def _target_modules(targets: list[str], linear_modules: Sequence[str]) -> list[str] | str:
    """A list matches exact paths and suffixes; where a suffix would also catch another module, one exact regex."""
    chosen = set(targets)
    ambiguous = any(
        module not in chosen and any(module.endswith(f".{target}") for target in targets) for module in linear_modules
    )
    return "|".join(target.replace(".", r"\.") for target in targets) if ambiguous else targets


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
