"""Cases of `quantize` and `plan`: damaged checkpoints and recipes."""

from __future__ import annotations

import json
import shutil

from support.fuzz_pickles import hostile_pickle
from support.fuzzing.case import Case
from support.fuzzing.damage import damage_bytes, damage_json, damage_safetensors, damage_weights
from support.fuzzing.damage_files import damage_files
from support.fuzzing.outputs import Outputs
from support.fuzzing.recipe_text import write_recipe
from support.fuzzing.sources import Sources


def some_config(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(
        sources.root / case.rng.choice(("tiny", "tiny", "llama", "gpt2", "bert", "t5", "mixtral")), case.source
    )
    case.edit("config.json", damage_json)
    if case.rng.random() < 0.15:
        config = {"model_type": case.rng.choice(("evil", "llama")), "architectures": ["EvilForCausalLM"]}
        config |= {"auto_map": {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": "modeling_evil.Evil"}}
        (case.source / "modeling_evil.py").write_text(f"open({str(case.mark)!r}, 'w')\n")
        (case.source / "config.json").write_text(json.dumps(config))
        case.damage = "the model's own code"


def some_header(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / "tiny", case.source)
    case.edit("model.safetensors", damage_safetensors)


def some_index(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / "sharded", case.source)
    if case.rng.random() < 0.8:
        case.edit("model.safetensors.index.json", damage_json)
    if case.rng.random() < 0.3:
        case.edit("model-00002-of-00002.safetensors", damage_safetensors)
    if case.rng.random() < 0.3:
        damage_files(case.rng, case.source)
    case.damage = "index and shards"


def some_weights(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / case.rng.choice(("tiny", "tiny", "fp8")), case.source)
    damage_weights(case.rng, case.source / "model.safetensors")
    case.damage = "odd tensors in a sound file"
    if case.rng.random() < 0.1:
        case.edit("config.json", damage_json)
    if case.rng.random() < 0.4:
        case.words.append("--allow-nonfinite")


def some_pickle(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / case.rng.choice(("bin", "legacy")), case.source)
    if case.rng.random() < 0.5:
        (case.source / "pytorch_model.bin").write_bytes(hostile_pickle(case.rng, case.mark, damage_bytes))
        case.damage = "pytorch_model.bin: hostile pickle"
    else:
        case.edit("pytorch_model.bin", damage_bytes)


def some_meta(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / "meta", case.source)
    how = case.rng.randrange(5)
    if how < 2:
        case.edit("params.json", damage_json)
    elif how == 2:
        case.edit("tokenizer.model", damage_bytes)
    elif how == 3:
        case.damage = damage_files(case.rng, case.source)
    else:
        data = hostile_pickle(case.rng, case.mark, damage_bytes)
        (case.source / "consolidated.01.pth").write_bytes(data)
        case.damage = "consolidated.01.pth: hostile pickle"


def some_files(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / case.rng.choice(("tiny", "sharded", "bin", "meta")), case.source)
    case.damage = damage_files(case.rng, case.source)


def some_side_file(case: Case, sources: Sources, outputs: Outputs) -> None:
    """Files that are copied, parsed for the card, or both."""
    shutil.copytree(sources.root / "tiny", case.source)
    name = case.rng.choice(("tokenizer.json", "tokenizer_config.json", "README.md", "chat_template.jinja"))
    case.edit(name, damage_json if name.endswith(".json") else damage_bytes)


def some_recipe(case: Case, sources: Sources, outputs: Outputs) -> None:
    shutil.copytree(sources.root / "tiny", case.source)
    write_recipe(case.rng, case.root / "recipe.yaml", case.mark)
    case.words = ["--config", str(case.root / "recipe.yaml")]
    case.damage = "recipe"
