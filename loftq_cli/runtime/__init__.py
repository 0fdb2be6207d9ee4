"""Layers and loading for training. `import loftq_cli.runtime` lets `from_pretrained` read packed checkpoints."""

from __future__ import annotations

from loftq_cli.runtime.linear import LoftqEmbedding, LoftqLinear
from loftq_cli.runtime.load import load
from loftq_cli.runtime.quantizer import LoftqConfig, LoftqHfQuantizer, is_packable, register

__all__ = ["LoftqConfig", "LoftqEmbedding", "LoftqHfQuantizer", "LoftqLinear", "is_packable", "load", "register"]
