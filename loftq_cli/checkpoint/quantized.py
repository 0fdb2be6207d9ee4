"""Recognize checkpoints that are quantized in a way that loftq cannot undo, and name the tool that wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.checkpoint.base import Checkpoint
from loftq_cli.checkpoint.local import read_json
from loftq_cli.checkpoint.scaled import quantization_of

MODELOPT = "hf_quant_config.json"
_MODELOPT_SCALES = (".weight_scale", ".weight_scale_2", ".weight_scale_inv")


def quantization_method(checkpoint: Checkpoint) -> str | None:
    """Return the quantization method of a checkpoint, with its width if known; None if it is not quantized.

    Raises:
        LoftqError: hf_quant_config.json is damaged.
    """
    quantization = quantization_of(checkpoint.config)
    mlx = _mlx(checkpoint, quantization)
    if mlx is not None:
        return mlx
    if quantization is not None:
        return str(quantization.get("quant_method", "unknown method"))
    return _modelopt(checkpoint)


def _mlx(checkpoint: Checkpoint, quantization: Mapping[str, Any] | None) -> str | None:
    """MLX writes `quantization`, and copies it to `quantization_config` without a method."""
    settings = checkpoint.config.get("quantization")
    if not isinstance(settings, Mapping) or "bits" not in settings or (quantization or {}).get("quant_method"):
        return None
    return f"MLX, {settings['bits']} bits"


def _modelopt(checkpoint: Checkpoint) -> str | None:
    """modelopt describes the quantization in a file of its own; FP8 weights were dequantized before this check."""
    if not any(name.endswith(_MODELOPT_SCALES) for name in checkpoint.tensors):
        return None
    if not (checkpoint.path / MODELOPT).exists():
        return None
    settings = read_json(checkpoint.path / MODELOPT, "modelopt writes it").get("quantization")
    algorithm = settings.get("quant_algo") if isinstance(settings, Mapping) else None
    return f"modelopt, {algorithm}" if algorithm else "modelopt"
