"""The stages of a plan, each on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_checkpoints import saved

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.errors import LoftqError
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.planning.build_units import build_units
from loftq_cli.planning.choices import choose
from loftq_cli.planning.output_files import lay_out_output
from loftq_cli.planning.plan import make_plan
from loftq_cli.planning.source import read_source
from loftq_cli.recipe.model import Recipe


def test_every_stage_takes_the_former_ones_result(random_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(random_llama), bits=4, rule=("q_proj=8", "nothing=2"))
    checkpoint = open_checkpoint(random_llama)
    source = read_source(recipe, checkpoint)
    assert len(source.modules.roles) == len(checkpoint.tensors) and source.fingerprint == checkpoint.fingerprint
    choices = choose(recipe, source)
    assert choices.recipe.format == "packed" and choices.dtype is torch.float32
    assert choices.notes == ("--rule 'nothing=2' matches no module of this model.",)
    assert {choice.bits for choice in choices.decisions.values()} == {0, 4, 8}
    work = build_units(source, choices)
    assert [unit.tensor for unit in work.units] == [role.tensor for role in source.modules.roles]
    assert work.notes == ("'nf' has no 8-bit codebook: 8-bit matrices take 'uniform' levels.",)
    layout = lay_out_output(source, choices, work, tmp_path / "out", "0")
    plan = make_plan(recipe, checkpoint, tmp_path / "out", "0")
    assert (plan.units, plan.files, plan.texts) == (work.units, layout.files, layout.texts)
    assert plan.notes == (*source.notes, *choices.notes, *work.notes) and plan.fingerprint == layout.fingerprint


def test_a_table_that_is_stored_twice_stays_what_its_twin_is(tmp_path: Path) -> None:
    tied = saved("llama_tied").folder
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((tied / "config.json").read_bytes())
    recipe = Recipe(str(tmp_path), embeddings="quantize", lm_head="quantize")
    roles = {role.tensor: role for role in read_source(recipe, open_checkpoint(tmp_path)).modules.roles}
    assert roles["lm_head.weight"].keep == Reason(Why.TIED, "model.embed_tokens.weight")
    assert roles["model.embed_tokens.weight"].keep == Reason(Why.TIED, "lm_head.weight")


def test_the_container_is_not_blamed_for_experts_that_a_rule_keeps(tmp_path: Path) -> None:
    rule = (r"experts\.=dense",)
    plan = loftq_cli.plan(saved("mixtral").folder, output=tmp_path / "out", bits=4, format="bnb", rule=rule)
    reasons = {unit.reason for unit in plan.kept if unit.kind == "expert"}
    assert reasons == {Reason(Why.RULE_DENSE, r"experts\.")}
    assert not any("cannot hold them" in note for note in plan.notes)


def test_a_class_that_cannot_be_built_is_named_though_another_was_taken(tmp_path: Path) -> None:
    source = saved("llama")
    config = {**source.config, "architectures": ["StrangeForCausalLM"], "hidden_act": "nope"}
    from json import dumps

    (tmp_path / "config.json").write_text(dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source.folder / "model.safetensors").read_bytes())
    with pytest.raises(LoftqError, match=r"cannot build model type llama from this config.json \(KeyError: 'nope'\);"):
        loftq_cli.plan(tmp_path)
