"""Llama-shaped checkpoints of random bfloat16 weights, written tensor by tensor, for benchmarks of whole conversions.

    python scripts/bench/synthetic.py 1b /somewhere/llama-1b

Every matrix has a decaying leading spectrum over noise, so that the low-rank step works as it does on trained weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loftq_cli.tensorfile.layout import lay_out, shard, shard_names
from loftq_cli.tensorfile.tensors import OutputTensor
from loftq_cli.tensorfile.writer import tensor_bytes

_LEADING = 32  # strong directions of a matrix
_SHARD = 5 * 10**9


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000


SHAPES = {
    "0.1b": Shape(768, 2048, 12, 12, 12),
    "0.4b-deep": Shape(768, 2048, 48, 12, 12),  # the same matrices, four times as many layers
    "1b": Shape(2048, 5632, 22, 32, 4),
    "3b": Shape(3200, 8640, 26, 32, 32),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
}


def tensors(shape: Shape) -> Iterator[OutputTensor]:
    """Names and shapes as transformers saves a LlamaForCausalLM."""

    def weight(name: str, *size: int) -> OutputTensor:
        return OutputTensor(f"{name}.weight", torch.bfloat16, size)

    kv = shape.hidden // shape.heads * shape.kv_heads
    yield weight("model.embed_tokens", shape.vocabulary, shape.hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield weight(f"{layer}.input_layernorm", shape.hidden)
        yield weight(f"{layer}.self_attn.q_proj", shape.hidden, shape.hidden)
        yield weight(f"{layer}.self_attn.k_proj", kv, shape.hidden)
        yield weight(f"{layer}.self_attn.v_proj", kv, shape.hidden)
        yield weight(f"{layer}.self_attn.o_proj", shape.hidden, shape.hidden)
        yield weight(f"{layer}.post_attention_layernorm", shape.hidden)
        yield weight(f"{layer}.mlp.gate_proj", shape.intermediate, shape.hidden)
        yield weight(f"{layer}.mlp.up_proj", shape.intermediate, shape.hidden)
        yield weight(f"{layer}.mlp.down_proj", shape.hidden, shape.intermediate)
    yield weight("model.norm", shape.hidden)
    yield weight("lm_head", shape.vocabulary, shape.hidden)


def draw(tensor: OutputTensor, generator: torch.Generator) -> torch.Tensor:
    """Random values: ones for norms, decaying spectrum plus noise for matrices."""
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    rows, columns = tensor.shape
    noise = torch.randn(rows, columns, generator=generator).mul_(0.02)
    strength = 0.04 * torch.logspace(0, -1, _LEADING) * (rows + columns) ** 0.5 / (rows * columns) ** 0.25
    left = torch.randn(rows, _LEADING, generator=generator).mul_(strength / _LEADING**0.5)
    noise.addmm_(left, torch.randn(_LEADING, columns, generator=generator))
    return noise.bfloat16()


def write_checkpoint(shape: Shape, path: Path, seed: int = 0) -> None:
    """Write a loadable checkpoint: shards, index and config.json."""
    path.mkdir(parents=True, exist_ok=True)
    shards = shard(((tensor,) for tensor in tensors(shape)), _SHARD)
    names = shard_names(len(shards))
    generator = torch.Generator().manual_seed(seed)
    for name, members in zip(names, shards):
        file = lay_out(name, members, {"format": "pt"})
        with open(path / name, "wb") as handle:
            handle.write(file.header)
            for tensor in file.tensors:
                handle.write(tensor_bytes(draw(tensor, generator)))
    if len(names) > 1:
        index = {tensor.name: name for name, members in zip(names, shards) for tensor in members}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(SHAPES[arguments.shape], arguments.path)
