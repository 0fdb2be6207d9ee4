"""The transformers plugin: packed checkpoints load, save and dequantize as their dense twins do, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import handmade
from support.handmade import logits
from support.packed_matrices import encoded
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from loftq_cli.errors import LoftqError
from loftq_cli.formats import get_format
from loftq_cli.formats.base import QuantizedMatrix
from loftq_cli.runtime import LoftqConfig, LoftqEmbedding, LoftqLinear, register

BITS = (2, 3, 4, 8)


def mixed_bits(index: int) -> int:
    return BITS[index % 4]


def without_fp32_modules(path: str, module: nn.Module) -> bool:
    """T5 keeps `wo` in float32 and casts to its dtype; loftq 0.1 never converted such modules."""
    return handmade.every_linear(path, module) and not path.endswith("wo")


FAMILIES = {
    "llama": (handmade.tiny_llama, AutoModelForCausalLM, handmade.every_linear),
    "gpt2": (handmade.tiny_gpt2, AutoModelForCausalLM, handmade.every_linear),
    "bert": (handmade.tiny_bert, AutoModelForMaskedLM, handmade.every_linear),
    "t5": (handmade.tiny_t5, AutoModelForSeq2SeqLM, without_fp32_modules),
    "t5 with wo": (handmade.tiny_t5, AutoModelForSeq2SeqLM, handmade.every_linear),
    "embeddings": (handmade.tiny_llama, AutoModelForCausalLM, handmade.with_embeddings),
    "tied embeddings": (handmade.tiny_gpt2, AutoModelForCausalLM, handmade.with_embeddings),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loads_runs_saves_and_dequantizes_exactly(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build, auto_class, pick = FAMILIES[family]
    made = handmade.write(build(), tmp_path / "out", bits=mixed_bits, dtype=dtype, pick=pick)
    model, info = auto_class.from_pretrained(made.folder, output_loading_info=True)
    assert not any(info.values())
    packed = {
        path: module for path, module in model.named_modules() if isinstance(module, (LoftqLinear, LoftqEmbedding))
    }
    assert set(made.modules) <= set(packed)
    for matrix in made.matrices:
        q = get_format("packed").decode(matrix, made.tensors.__getitem__)
        assert torch.equal(packed[matrix.module].dequantized_weight().float(), q)
    expected = logits(made.twin)
    assert torch.equal(logits(model), expected)

    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == made.tensors.keys()
    for name, tensor in again.items():
        assert tensor.dtype == made.tensors[name].dtype and torch.equal(tensor, made.tensors[name])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made.folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    ties = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.dequantize()
    assert not any(isinstance(module, (LoftqLinear, LoftqEmbedding)) for module in model.modules())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == ties
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(auto_class.from_pretrained(tmp_path / "dense")), expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> handmade.Handmade:
    folder = tmp_path_factory.mktemp("llama") / "out"
    return handmade.write(handmade.tiny_llama(), folder, bits=mixed_bits, n_shards=3)


def test_the_dtype_asked_for_does_not_change_the_stored_values(llama: handmade.Handmade) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for matrix in llama.matrices:
        module = model.get_submodule(matrix.module)
        assert module.weight_absmax.dtype == torch.float32
        q = get_format("packed").decode(matrix, llama.tensors.__getitem__)
        assert torch.equal(module.dequantized_weight(), q)
    twin = type(llama.twin).from_pretrained(f"{llama.folder}-twin", dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(twin))


PLACES = {
    "one device": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "4GiB"}},
    "disk": {"device_map": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
                            "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_device_maps(place: str, llama: handmade.Handmade, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder, offload_folder=str(tmp_path), **PLACES[place])
    if place == "disk":
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), logits(llama.twin))
    assert torch.equal(logits(model), logits(llama.twin)), "a second pass reads offloaded codes again"
    model.dequantize()
    assert torch.equal(logits(model), logits(llama.twin))


def test_a_sharded_round_trip(llama: handmade.Handmade, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    again = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert again.keys() == llama.tensors.keys()
    assert all(torch.equal(again[name], llama.tensors[name]) for name in again)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama.twin))


def test_another_class_of_the_family_finds_its_modules(llama: handmade.Handmade, tmp_path: Path) -> None:
    model, info = AutoModel.from_pretrained(llama.folder, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model.layers[1].mlp.up_proj, LoftqLinear)
    assert torch.equal(logits(model), logits(llama.twin.model))
    bare = handmade.write(handmade.tiny_llama(cls="LlamaModel"), tmp_path / "bare")
    assert "layers.0.mlp.up_proj" in bare.modules
    with_head = AutoModelForCausalLM.from_pretrained(bare.folder)
    assert torch.equal(logits(with_head.model), logits(bare.twin))


def test_models_copy_and_cast_as_a_whole(llama: handmade.Handmade) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    expected = logits(llama.twin)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(logits(other), expected) for other in copies)
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_absmax.dtype == torch.float32
    model.to(torch.float32)
    assert all(torch.equal(model.get_submodule(path).weight_absmax, copies[0].get_submodule(path).weight_absmax)
               for path in llama.modules)  # fmt: skip


def test_tied_tables_share_codes_and_scales(tmp_path: Path) -> None:
    made = handmade.write(handmade.tiny_llama(tied=True), tmp_path / "out", pick=handmade.with_embeddings)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    head, table = model.lm_head, model.model.embed_tokens
    assert head.weight is table.weight and head.stored()[1] is table.weight_absmax
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.lm_head.stored()[1] is other.model.embed_tokens.weight_absmax
    assert torch.equal(logits(other), logits(made.twin))


def test_registering_again_is_harmless() -> None:
    register()
    register()


def config_of(**changes: object) -> dict:
    grid = encoded((8, 32), 2, torch.float32)[0]
    matrix = QuantizedMatrix("m.weight", "m", "linear", 8, 32, grid)
    return get_format("packed").quantization_config([matrix], [], torch.bfloat16) | changes


def test_config_round_trips_with_fields_it_does_not_know() -> None:
    written = config_of(remark="kept")
    config = LoftqConfig.from_dict(written)
    assert config.to_dict() == written
    (group,) = config.packed_groups()
    assert group.modules == ("m",) and group.grid.value_dtype == torch.bfloat16
    assert group.grid.codebook == encoded((8, 32), 2, torch.float32)[0].codebook


def test_configs_that_cannot_be_read_say_so() -> None:
    with pytest.raises(LoftqError, match=r"layout version 99 .*pip install -U 'loftq-cli @ git"):
        LoftqConfig.from_dict(config_of(version=99))
    group = config_of()["groups"][0]
    for damage in ({"levels": [0.0, 1.0]}, {"scale_dtype": "int7"}, {"bits": "two"}):
        with pytest.raises(LoftqError, match="damaged"):
            LoftqConfig.from_dict(config_of(groups=[group | damage]))
    with pytest.raises(LoftqError, match="damaged"):
        LoftqConfig.from_dict(config_of(groups=[{}]))


def test_checkpoints_that_do_not_fit_the_class_say_so(llama: handmade.Handmade) -> None:
    config = AutoConfig.from_pretrained(llama.folder)
    groups = config.quantization_config["groups"]
    for group in groups:
        group["modules"] = [f"elsewhere.{path}" for path in group["modules"]]
    with pytest.raises(LoftqError, match="none of the packed modules"):
        AutoModelForCausalLM.from_pretrained(llama.folder, config=config)
    groups[0]["modules"] = ["model.norm"]
    with pytest.raises(LoftqError, match=r"'model\.norm' is a LlamaRMSNorm.*--rule"):
        AutoModelForCausalLM.from_pretrained(llama.folder, config=config)
