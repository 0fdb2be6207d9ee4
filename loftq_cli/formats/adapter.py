"""The adapter as PEFT loads it: tensors and adapter_config.json in `loftq_init/`, in PEFT 0.21's own layout.

Adapters are in a subfolder because transformers would load an adapter in the root folder together with the backbone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq_cli.modules.experts import Expert
from loftq_cli.numerics.methods.qalora import peft_constant, pooled, widened
from loftq_cli.tensorfile.entry_names import share_name
from loftq_cli.tensorfile.tensors import OutputTensor

FOLDER = "loftq_init"
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"
CONFIG = f"{FOLDER}/adapter_config.json"
FINGERPRINT = "loftq_fingerprint"  # in the metadata of weights, and in the adapter's `auto_mapping`


@dataclass(frozen=True)
class AdapterTarget:
    """One adapted matrix: lora_b [out, rank] @ lora_a [rank, in] is added to W [out, in].

    Attributes:
        parameter: the parameter that PEFT targets instead of the module (`target_parameters`); "" for a module.
        expert: the expert's place, if experts share an adapter.
        group: number of inputs that are pooled before A, so that A is [rank, in / group] (QA-LoRA); 1 for none.
    """

    module: str
    kind: str
    out_features: int
    in_features: int
    rank: int
    parameter: str = ""
    expert: Expert | None = None
    group: int = 1

    @property
    def parts(self) -> int:
        return 1 if self.expert is None else self.expert.parts

    def constant(self, scaling: float) -> float:
        """Return the factor by which PEFT multiplies BA."""
        return scaling if self.group == 1 else scaling * peft_constant(self.in_features, self.group)


def adapter_tensors(target: AdapterTarget) -> tuple[OutputTensor, OutputTensor]:
    """Return names and shapes of A and B as one unit of work writes them. PEFT stores an embedding's factors transposed
    and without `.weight`.

    Experts share a pair. In A [experts * rank, in] one expert's rows are contiguous, so a matrix's own lora_a is a
    piece of it. In B [out, rank * experts] the expert index varies fastest: each lora_b is stored separately until
    `joint_b` gathers them.
    """
    if target.expert is not None:
        prefix, shape = _expert_prefix(target), (_joint(target), target.in_features)
        whole = OutputTensor(f"{prefix}.lora_A.weight", torch.float32, shape)
        first = (target.expert.index * target.parts + target.expert.part) * target.rank
        place = share_name(f"{prefix}.lora_B.weight", target.expert.index, target.expert.part)
        return (
            whole.rows(first, target.rank),
            OutputTensor(place, torch.float32, (target.out_features, target.rank)),
        )
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


def joint_b(target: AdapterTarget) -> OutputTensor | None:
    """Return lora_B of all experts of a parameter; None if the file stores the unit's own lora_B."""
    if target.expert is None:
        return None
    shape = (target.parts * target.out_features, _joint(target))
    return OutputTensor(f"{_expert_prefix(target)}.lora_B.weight", torch.float32, shape)


def own_columns(target: AdapterTarget, rows: Tensor) -> Tensor:
    """Return a view [n, rank] of this matrix's columns in joint rows [n, parts * rank * experts]."""
    assert target.expert is not None
    first = target.expert.part * target.rank
    return rows.unflatten(1, (-1, target.expert.count))[:, first : first + target.rank, target.expert.index]


def _joint(target: AdapterTarget) -> int:
    """Return the sum of the ranks of all matrices of a parameter."""
    assert target.expert is not None
    return target.expert.count * target.parts * target.rank


def _expert_prefix(target: AdapterTarget) -> str:
    """Return the key's prefix: PEFT wraps a module once for every targeted parameter, the first one innermost."""
    assert target.expert is not None
    module = target.parameter.rpartition(".")[0]
    return f"base_model.model.{module}" + ".base_layer" * target.expert.depth


def encode_adapter(target: AdapterTarget, lora_a: Tensor, lora_b: Tensor, scaling: float) -> dict[str, Tensor]:
    """Return the tensors by name. PEFT multiplies BA by a constant, so B is divided by it.

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
    """Return B [out, r] and A [r, in], float32, whose product PEFT adds to the weight."""
    first, second = (tensors[tensor.name].float() for tensor in adapter_tensors(target))
    b, a = (first.T, second.T) if target.kind == "embedding" else (second, first)
    constant = target.constant(scaling)
    return b if constant == 1.0 else b * constant, a if target.group == 1 else widened(a, target.group)


def adapter_config(
    targets: Sequence[AdapterTarget],
    modules: Sequence[str],
    *,
    scaling: float,
    task_type: str | None,
    base_model: str,
    fan_in_fan_out: bool,
    fingerprint: str,
) -> dict[str, Any]:
    """Return adapter_config.json. Modules have full paths; ranks other than the most common one are in `rank_pattern`.

    Args:
        modules: the paths of all modules of the model, or at least of those that PEFT can adapt.

    `init_lora_weights` stays true: "loftq" would make PEFT run its own LoftQ on top of ours. `auto_mapping` holds the
    conversion's fingerprint, because PEFT keeps that field when it saves a trained adapter. Without a task type PEFT
    itself writes the model's class there.
    """
    # If gate and up are joined, their ranks add up: B is block-diagonal.
    ranks = {target.parameter or target.module: target.rank * target.parts for target in targets}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = _rank_pattern(ranks, rank)
    layers = [target.module for target in targets if not target.parameter]
    parameters = [name for name in ranks if name not in set(layers)]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        **({"auto_mapping": {FINGERPRINT: fingerprint}} if task_type else {}),
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(rank * scaling),
        "lora_dropout": 0.0,
        "target_modules": _target_modules(layers, modules),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": others,
        "alpha_pattern": {module: _number(other * scaling) for module, other in others.items()},
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        **_pooling({target.group for target in targets}),
    }


def _pooling(groups: set[int]) -> dict[str, Any]:
    """Return PEFT's own fields for QA-LoRA."""
    assert len(groups) == 1, "PEFT has one group size for all"
    (group,) = groups
    return {} if group == 1 else {"use_qalora": True, "qalora_group_size": group}


def _target_modules(targets: list[str], modules: Sequence[str]) -> list[str] | str:
    """Return a list, which matches paths and suffixes, or one exact regex if a suffix would match other modules too."""
    chosen = set(targets)
    ambiguous = any(module not in chosen and _ends_like(module, chosen) for module in modules)
    return "|".join(target.replace(".", r"\.") for target in targets) if ambiguous else targets


def _rank_pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return the ranks other than `rank` by name. PEFT takes the first key that is the name or its end, so a name that
    ends like another one is listed too, before it."""
    others = {name: other for name, other in ranks.items() if other != rank}
    shadowed = {name: ranks[name] for name in ranks if _ends_like(name, others)}
    if not shadowed:
        return others
    return dict(sorted((others | shadowed).items(), key=lambda item: -item[0].count(".")))


def _ends_like(name: str, paths: Container[str]) -> bool:
    """True if `name` is one of `paths` with a prefix; takes time in proportion to its parts, not to the paths."""
    parts = name.split(".")
    return any(".".join(parts[first:]) in paths for first in range(1, len(parts)))


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
