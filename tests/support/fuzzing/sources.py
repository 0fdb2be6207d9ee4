"""Small sound checkpoints of every kind, made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Sources:
    """Small sound checkpoints of every kind, made once."""

    def __init__(self, root: Path) -> None:
        from support.families import FAMILIES
        from support.meta_reference import make_reference, tiktoken_file, tiktoken_ranks, write_meta

        self.root = root
        for family in ("llama", "gpt2", "bert", "t5", "mixtral"):
            FAMILIES[family]().save_pretrained(root / family)
        self._small_llama(root / "tiny")
        shutil.copytree(root / "llama", root / "sharded")
        self._shard(root / "sharded")
        tensors = load_file(root / "tiny" / "model.safetensors")
        for name, zipped in (("bin", True), ("legacy", False)):
            shutil.copytree(root / "tiny", root / name)
            (root / name / "model.safetensors").unlink()
            torch.save(tensors, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        small = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 32, "rope_theta": 500000.0}
        self._fp8(root / "fp8", tensors)
        ranks = tiktoken_ranks(0)
        meta = write_meta(make_reference(len(ranks) + 16, **small), root / "meta", ranks=2, embedding_dim=0)
        (meta / "tokenizer.model").write_bytes(tiktoken_file(ranks))

    def _small_llama(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=48, max_position_embeddings=32, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        _write_tokenizer(folder)

    def _fp8(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """As DeepSeek-V3 stores its weights."""
        shutil.copytree(self.root / "tiny", folder)
        stored = {}
        for name, tensor in tensors.items():
            if "proj" in name:
                stored[name] = tensor.to(torch.float8_e4m3fn)
                stored[f"{name}_scale_inv"] = torch.ones(-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16))
            else:
                stored[name] = tensor
        save_file(stored, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (folder / "config.json").write_text(json.dumps(config))

    def _shard(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, index = list(tensors), {}
        for i in range(2):
            file, part = f"model-{i + 1:05d}-of-00002.safetensors", names[i::2]
            save_file({name: tensors[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of words, with chat templates, and a card."""
    words = ["[UNK]", "[BOS]", *"abcdefghijklmnopqrstuvwxyz", *(f"word{i}" for i in range(20))]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "[UNK]"}
    pieces = {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}
    added = [
        {"id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i in range(2)
    ]  # fmt: skip
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    content = {"version": "1.0", **empty, "added_tokens": added, "pre_tokenizer": pieces, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "bos_token": "[BOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 32}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# A model\n")
