"""Cases of `merge`: damaged adapters, backbones and outputs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.fuzzing.case import Case
from support.fuzzing.damage import damage_bytes, damage_json, damage_safetensors, damage_weights
from support.fuzzing.damage_files import damage_files
from support.fuzzing.odd_values import AMOUNTS, COUNTS, NAMES, PATTERNS, WEIRD
from support.fuzzing.output_kinds import odd_field, odd_matrix, reseal
from support.fuzzing.outputs import MERGEABLE, Outputs
from support.fuzzing.sources import Sources


def some_merge(case: Case, sources: Sources, outputs: Outputs) -> None:
    rng, name = case.rng, case.rng.choice(("packed", "packed", *MERGEABLE))
    backbone, adapter = outputs.merge_words(name)
    if name == "packed" and rng.random() < 0.3:
        adapter = adapter.with_name("whole")
    shutil.copytree(backbone, case.source)
    shutil.copytree(adapter, case.root / "adapter")
    case.damage = rng.choice(_DAMAGES)(case)
    case.command = "merge"
    case.words = [str(case.source), str(case.root / "adapter"), "-o", str(case.out)]
    case.words += ["--to", rng.choice(("auto", "auto", "dense", "zeros", "gguf", "requantize"))]
    case.words += rng.choice(([], [], ["--dtype", "float16"], ["--dtype", "float32"], ["--overwrite"]))
    case.words += rng.choice(([], [], ["--max-shard-size", "20KB"], ["--json"]))


def _config(case: Case) -> dict[str, Any]:
    return json.loads((case.root / "adapter" / "adapter_config.json").read_bytes())


def _write_config(case: Case, values: dict[str, Any]) -> None:
    text = json.dumps(values).encode("utf-8", "surrogatepass")
    (case.root / "adapter" / "adapter_config.json").write_bytes(text)


def _config_json(case: Case) -> str:
    path = case.root / "adapter" / "adapter_config.json"
    path.write_bytes(damage_json(case.rng, path.read_bytes()))
    return "adapter_config.json: JSON"


def _numbers(case: Case) -> str:
    """Absurd ranks and alphas."""
    values, rng = _config(case), case.rng
    for _ in range(rng.choice((1, 2))):
        name = rng.choice(("r", "lora_alpha", "lora_alpha", "qalora_group_size", "lora_dropout"))
        values[name] = rng.choice(AMOUNTS if name == "lora_alpha" else COUNTS)
    _write_config(case, values)
    return "adapter_config.json: absurd rank or alpha"


def _patterns(case: Case) -> str:
    """Expressions that backtrack, and absurd values for what they match."""
    values, rng = _config(case), case.rng
    count = rng.choice((1, 1, 3, 200))
    keys = [rng.choice((*PATTERNS, *NAMES)) for _ in range(count)]
    values[rng.choice(("rank_pattern", "alpha_pattern"))] = {key: rng.choice((2, 4, *COUNTS)) for key in keys}
    _write_config(case, values)
    return "adapter_config.json: expressions"


def _lists(case: Case) -> str:
    """Modules, parameters and tokens that are not there, or are too many."""
    values, rng = _config(case), case.rng
    name = rng.choice(("target_modules", "target_parameters", "modules_to_save", "trainable_token_indices"))
    odd = (list(NAMES[:8]), [2**31], [-1], [0, 0], list(range(10**4)), {"x": [0]}, "all-linear", [PATTERNS[0]])
    values[name] = rng.choice((*odd, *WEIRD))
    _write_config(case, values)
    return f"adapter_config.json: {name}"


def _other_kinds(case: Case) -> str:
    values, rng = _config(case), case.rng
    name = rng.choice(
        ("peft_type", "use_dora", "bias", "lora_bias", "use_rslora", "use_qalora", "init_lora_weights", "task_type",
         "base_model_name_or_path", "fan_in_fan_out", "layer_replication", "auto_mapping", "megatron_config")
    )  # fmt: skip
    values[name] = rng.choice((True, "all", "pissa", *WEIRD, *NAMES))
    _write_config(case, values)
    return "adapter_config.json: another kind"


def _edit_weights(case: Case, edit: Callable[[random.Random, dict[str, torch.Tensor]], None]) -> None:
    path = case.root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(case.rng, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _nonfinite(case: Case) -> str:
    def edit(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[rng.choice(sorted(tensors))]
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))

    _edit_weights(case, edit)
    return "adapter: NaN or infinity"


def _extremes(case: Case) -> str:
    def edit(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name] * rng.choice((1e20, 3e38, 1e5, 1e-40, 0.0))

    _edit_weights(case, edit)
    return "adapter: extreme values"


def _duplicates(case: Case) -> str:
    """The same matrix under two names."""

    def edit(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
        chosen = rng.choice(sorted(name for name in tensors if "lora_" in name))
        stem = chosen.partition(".lora_")[0]
        twins = {
            0: lambda name: name.replace("base_model.model.", "base_model.model.model.", 1),
            1: lambda name: name.replace(".model.layers.", ".layers.", 1),
            2: lambda name: name.replace(".weight", ""),
            3: lambda name: name.replace(".weight", ".default.weight"),
            4: lambda name: name.replace(".lora_", ".base_layer.lora_"),
            5: lambda name: name.replace("base_model.model.", ""),
        }
        twin = twins[rng.randrange(len(twins))]
        for name in [name for name in tensors if name.startswith(stem)]:
            tensors[twin(name)] = tensors[name] * 2

    _edit_weights(case, edit)
    return "adapter: duplicated factors"


def _shapes(case: Case) -> str:
    damage_weights(case.rng, case.root / "adapter" / "adapter_model.safetensors")
    return "adapter: odd tensors"


def _header(case: Case) -> str:
    path = case.root / "adapter" / "adapter_model.safetensors"
    path.write_bytes(damage_safetensors(case.rng, path.read_bytes()))
    return "adapter: header or bytes"


def _names(case: Case) -> str:
    """Factors of modules with odd names."""

    def edit(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
        odd = rng.choice([name for name in NAMES if "\ud800" not in name and name != "__metadata__"])
        for name in ("lora_A.weight", "lora_B.weight"):
            old = next(key for key in tensors if key.endswith(name))
            tensors[f"base_model.model.{odd}.{name}"] = tensors[old].clone()

    _edit_weights(case, edit)
    return "adapter: odd names"


def _files(case: Case) -> str:
    return f"adapter: {damage_files(case.rng, case.root / 'adapter')}"


def _backbone(case: Case) -> str:
    how = case.rng.randrange(4)
    if how == 0:
        return f"backbone: {damage_files(case.rng, case.source)}"
    if how == 1:
        damage = case.rng.choice((odd_matrix, odd_field))
        reseal(case.source, lambda values: damage(case.rng, values, case.root))
        return f"backbone: {damage.__name__.replace('_', ' ')}"
    if how == 2:
        case.edit("config.json", damage_json)
        return "backbone: config.json"
    path = case.source / "model.safetensors"
    path.write_bytes(damage_bytes(case.rng, path.read_bytes()))
    return "backbone: bytes of the weights"


def _output(case: Case) -> str:
    """An output that is something else, or a finished merge whose record names other files."""
    how = case.rng.randrange(6)
    if how == 0:
        case.out.symlink_to(case.source)
    elif how == 1:
        case.out.mkdir()
        (case.out / "loftq_merge.json").write_text(json.dumps({"files": {"../outside.txt": 1, "mine.txt": 1}}))
        (case.out / "mine.txt").write_bytes(b"x")
    elif how == 2:
        (case.out / ".loftq").mkdir(parents=True)
        mark = json.dumps(["../outside.txt", "mine.txt", "..", "/", case.rng.choice(WEIRD)])
        (case.out / ".loftq" / "merge").write_text(mark)
        (case.out / "mine.txt").write_bytes(b"x")
    elif how == 3:
        case.out.mkdir()
        (case.out / ".loftq").symlink_to(case.rng.choice((case.source, Path("/etc"), case.root)))
    elif how == 4:
        (case.out / ".loftq").mkdir(parents=True)
        (case.out / ".loftq" / "partial").symlink_to(case.source)
    else:
        case.out.write_bytes(b"x")
    return "output: something else"


def _undamaged(case: Case) -> str:
    return "none"


_DAMAGES: tuple[Callable[[Case], str], ...] = (
    _config_json, _numbers, _numbers, _patterns, _patterns, _lists, _lists, _other_kinds, _nonfinite, _extremes,
    _duplicates, _duplicates, _shapes, _shapes, _header, _names, _files, _files, _backbone, _backbone, _output,
    _undamaged,
)  # fmt: skip
