"""QA-LoRA for every linear layer: PEFT supports it for GPTQ layers only and ignores it elsewhere.

`PooledLora` is PEFT's own LoRA layer with PEFT's own QA-LoRA variant. It adds the parts that PEFT does not need for
GPTQ layers: the update as a matrix, and merging it into a dense weight. PEFT finds the layer through the config that
`with_pooled_layers` prepares.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

from loftq_cli.numerics.methods.qalora import peft_constant, widened


class PooledVariant(QALoraLinearVariant):
    """PEFT's QA-LoRA variant that can also compute the matrix it adds to the weight."""

    @staticmethod
    def get_delta_weight(module: Any, active_adapter: str) -> Tensor:
        """Return ΔW [out, in], constant within groups."""
        group = module.qalora_group_size[active_adapter]
        product = module.lora_B[active_adapter].weight @ module.lora_A[active_adapter].weight
        return widened(product * (module.scaling[active_adapter] * peft_constant(module.in_features, group)), group)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _delta(module, active_adapter, orig_weight)


def _delta(module: Any, active_adapter: str, weight: Tensor) -> Tensor:
    delta = PooledVariant.get_delta_weight(module, active_adapter).to(weight.dtype)
    return delta.T if module.fan_in_fan_out else delta


class PooledLora(lora.Linear):
    """A LoRA layer over any `nn.Linear`, packed ones included, whose A sees inputs pooled over groups."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        return PooledVariant()

    def get_delta_weight(self, adapter: str) -> Tensor:
        return PooledVariant.get_delta_weight(self, adapter)


def with_pooled_layers(config: LoraConfig) -> LoraConfig:
    """Register the pooled layer in a QA-LoRA config; PEFT itself handles other configs and GPTQ layers."""
    if getattr(config, "use_qalora", False):
        config._register_custom_module({nn.Linear: PooledLora})
    return config
