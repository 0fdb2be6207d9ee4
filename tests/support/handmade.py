"""Converted checkpoints written by hand (random adapters, no LoftQ), and the dense twins that a loader must match."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loftq_cli.formats import get_format
from loftq_cli.formats.base import GridRequest, MatrixKind, QuantizedMatrix, Refusal
from loftq_cli.numerics.grids.blocks import quantize


@dataclass(frozen=True)
class Handmade:
    """A converted directory.

    Attributes:
        twin: the source model with every packed weight replaced by what the format's own `decode` gives.
        tensors: everything in the backbone's files.
        adapter: everything in the adapter's file.
    """

    folder: Path
    twin: PreTrainedModel
    matrices: tuple[QuantizedMatrix, ...]
    tensors: dict[str, Tensor]
    adapter: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        return [matrix.module for matrix in self.matrices]


def every_linear(path: str, module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and not path.endswith(("lm_head", "decoder", "score", "classifier"))


def with_embeddings(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or every_linear(path, module)


def write(
    model: PreTrainedModel,
    folder: Path,
    *,
    fmt: str = "packed",
    bits: Callable[[int], int] = lambda _index: 2,
    dtype: torch.dtype = torch.float32,
    pick: Callable[[str, nn.Module], bool] = every_linear,
    n_shards: int = 1,
    rank: int = 4,
    task_type: str | None = None,
    data_type: str = "nf",
) -> Handmade:
    """Quantize the chosen modules of a tiny model and write what `loftq quantize` would, without the LoftQ steps."""
    torch.manual_seed(1)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    on_disk = _names_on_disk(model, tensors)
    (folder / "model.safetensors").unlink()
    matrices, adapter = [], {}
    picked = [(path, module) for path, module in model.named_modules() if pick(path, module)]
    for index, (path, module) in enumerate(picked):
        matrix = _matrix(on_disk[path], path, module, fmt, bits(index), dtype, data_type)
        weight = module.weight.detach().float()
        quantized = quantize(weight.T.contiguous() if matrix.kind == "conv1d" else weight, matrix.grid)
        encoded = get_format(fmt).encode(matrix, quantized)
        tensors = {**{key: value for key, value in tensors.items() if key != matrix.tensor}, **encoded}
        q = get_format(fmt).decode(matrix, encoded.__getitem__).to(dtype)
        module.weight.data = q.T.contiguous() if matrix.kind == "conv1d" else q
        matrices.append(matrix)
        adapter |= _adapter(matrix, rank + index % 2)
    _write_config(model, folder, fmt, matrices, dtype)
    _write_shards(tensors, folder, n_shards)
    _write_adapter(folder, matrices, adapter, rank, task_type)
    # Loaded, not cast: casting a live model also rounds its rotary frequencies.
    model.save_pretrained(folder.parent / f"{folder.name}-twin")
    twin = aligned(type(model).from_pretrained(folder.parent / f"{folder.name}-twin", dtype=dtype))
    return Handmade(folder, twin, tuple(matrices), tensors, adapter)


def _names_on_disk(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return module path -> name of its weight in the file, matched by value: the weights are random."""
    by_value = {tensor.cpu().float().numpy().tobytes(): name for name, tensor in tensors.items()}
    weights = [(path, module.weight) for path, module in model.named_modules() if hasattr(module, "weight")]
    values = {path: weight.detach().float().contiguous().numpy().tobytes() for path, weight in weights}
    return {path: by_value[value] for path, value in values.items() if value in by_value}


def _matrix(
    tensor: str, path: str, module: nn.Module, fmt: str, bits: int, dtype: torch.dtype, data_type: str
) -> QuantizedMatrix:
    kind: MatrixKind = "embedding" if isinstance(module, nn.Embedding) else "linear"
    kind = "conv1d" if isinstance(module, Conv1D) else kind
    shape = module.weight.shape[::-1] if kind == "conv1d" else module.weight.shape
    grid = get_format(fmt).grid(GridRequest(kind, *shape, bits, data_type, 32, dtype))
    assert not isinstance(grid, Refusal)
    return QuantizedMatrix(tensor, path, kind, *shape, grid)


def _adapter(matrix: QuantizedMatrix, rank: int) -> dict[str, Tensor]:
    a, b = torch.randn(rank, matrix.in_features) / 8, torch.randn(matrix.out_features, rank) / 8
    path = f"base_model.model.{matrix.module}"
    if matrix.kind == "embedding":
        # delta = (B A)^T, so A is [r, vocabulary] and B [width, r].
        return {f"{path}.lora_embedding_A": b.T.contiguous(), f"{path}.lora_embedding_B": a.T.contiguous()}
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def _write_config(
    model: PreTrainedModel, folder: Path, fmt: str, matrices: list[QuantizedMatrix], dtype: torch.dtype
) -> None:
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    dense = [path for path in linears if path not in {matrix.module for matrix in matrices}]
    config = json.loads((folder / "config.json").read_text())
    if (quantization := get_format(fmt).quantization_config(matrices, dense, dtype)) is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def _write_shards(tensors: dict[str, Tensor], folder: Path, n_shards: int) -> None:
    metadata = {"format": "pt", "loftq_fingerprint": "same"}
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = names[shard::n_shards]  # codes and scales of a layer end up in different files
        save_file({name: tensors[name] for name in part}, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_adapter(
    folder: Path, matrices: list[QuantizedMatrix], adapter: dict[str, Tensor], rank: int, task_type: str | None
) -> None:
    home = folder / "loftq_init"
    home.mkdir()
    higher = {matrix.module: rank + 1 for index, matrix in enumerate(matrices) if index % 2}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": str(folder),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": [matrix.module for matrix in matrices],
        "rank_pattern": higher,
        "alpha_pattern": higher,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    (home / "adapter_config.json").write_text(json.dumps(config))
    metadata = {"format": "pt", "loftq_fingerprint": "same"}
    save_file(adapter, home / "adapter_model.safetensors", metadata=metadata)


def tiny_llama(*, tied: bool = False, cls: str = "LlamaForCausalLM") -> PreTrainedModel:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return getattr(transformers, cls)(config)


def two_layer_llama() -> PreTrainedModel:
    """Return a Llama wide enough for groups of 32 and 64, with fewer key than query heads and an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32))


def tiny_bert(cls: str = "BertForMaskedLM") -> PreTrainedModel:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return getattr(transformers, cls)(config)


def tiny_t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, vocab_size=50, pad_token_id=0)
    return T5ForConditionalGeneration(config)


def aligned(model: nn.Module) -> nn.Module:
    """Copy weights out of the mapped file: the last bit of a product depends on the alignment of its factors."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    return model


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> Tensor:
    """Return the first output for a fixed batch, without gradients."""
    ids = tokens()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return aligned(model)(input_ids=ids, **more)[0]
