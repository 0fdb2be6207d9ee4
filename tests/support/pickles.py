"""Checkpoints as torch pickles."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def as_pickle(source: Path, target: Path, *, shards: int = 1, index: bool = True, legacy: bool = False) -> Path:
    """Write a checkpoint in the form that transformers 4 wrote."""
    target.mkdir()
    for name in CONFIGS:
        (target / name).write_bytes((source / name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        torch.save({name: tensors[name] for name in part}, target / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1 and index:
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


CONFIGS = ("config.json", "generation_config.json")
