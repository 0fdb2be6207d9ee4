"""`load`: backbone and adapter in one call, from every container, as every class; training, merging, refusals."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import handmade
from support.handmade import logits, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loftq_cli.errors import LoftqError
from loftq_cli.runtime import LoftqLinear, load

BITS = (2, 3, 4, 8)


def mixed_bits(index: int) -> int:
    return BITS[index % 4]


def adapted_twin(made: handmade.Handmade, *, trainable: bool = False) -> PeftModel:
    """A fresh dense twin with the same adapter, straight through PEFT."""
    twin = type(made.twin).from_pretrained(f"{made.folder}-twin", dtype=made.twin.dtype)
    return PeftModel.from_pretrained(twin, made.folder, subfolder="loftq_init", is_trainable=trainable)


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors with the names they have in a file."""
    state = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    return {key.replace(".default", ""): value for key, value in state.items()}


def loss_of(model: nn.Module) -> Tensor:
    ids = tokens()
    return model(input_ids=ids, labels=ids).loss


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> handmade.Handmade:
    folder = tmp_path_factory.mktemp("llama") / "out"
    return handmade.write(handmade.tiny_llama(), folder, bits=mixed_bits, task_type="CAUSAL_LM")


FORMATS = {"packed": (handmade.tiny_llama, 2), "dense": (handmade.tiny_llama, 2), "bnb": (handmade.tiny_llama, 4)}


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_container_loads_with_its_adapter(fmt: str, tmp_path: Path) -> None:
    if fmt == "bnb":
        pytest.importorskip("bitsandbytes")
    build, bits = FORMATS[fmt]
    # bitsandbytes holds rows of whole blocks only: `down_proj` has 48 inputs.
    pick = handmade.every_linear
    made = handmade.write(
        build(), tmp_path / "out", fmt=fmt, bits=lambda _: bits, task_type="CAUSAL_LM",
        pick=lambda path, module: pick(path, module) and not (fmt == "bnb" and path.endswith("down_proj")),
    )  # fmt: skip
    model = load(made.folder, trainable=True)
    assert type(model).__name__ == "PeftModelForCausalLM"
    loaded = adapter_of(model)
    assert loaded.keys() == made.adapter.keys()
    assert all(torch.equal(loaded[key], made.adapter[key]) and loaded[key].requires_grad is False for key in loaded)
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert not any(flags) and bool(flags) == (fmt == "bnb")
    model.train()
    twin = adapted_twin(made, trainable=True).train()
    ours, theirs = loss_of(handmade.aligned(model)), loss_of(handmade.aligned(twin))
    assert torch.equal(ours, theirs)
    for loss in (ours, theirs):
        loss.backward()
    pairs = zip(model.named_parameters(), twin.named_parameters())
    grads = [(a.grad, b.grad) for (name, a), (_, b) in pairs if ".lora_" in name]
    assert grads and all(torch.equal(a, b) for a, b in grads)
    assert load(made.folder, adapter=False).get_submodule(made.modules[0]) is not None


def test_plain_peft_loads_it_too(llama: handmade.Handmade) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(llama.folder)
    model = PeftModel.from_pretrained(backbone, llama.folder, subfolder="loftq_init", is_trainable=True)
    assert torch.equal(logits(model), logits(load(llama.folder)))
    assert sum(p.requires_grad for p in model.parameters()) == len(llama.adapter)
    assert not any(p.requires_grad for p in load(llama.folder).parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_codes(llama: handmade.Handmade, checkpointing: bool) -> None:
    model = load(llama.folder, trainable=True).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = model.get_base_model().state_dict()
    for name in (name for name in llama.tensors if name.endswith("_absmax")):
        path = name.removesuffix(".weight_absmax")
        assert torch.equal(state[f"{path}.base_layer.weight"], llama.tensors[f"{path}.weight"])
        assert torch.equal(state[f"{path}.base_layer.weight_absmax"], llama.tensors[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "embeddings"])
def test_merging_after_dequantizing_equals_the_dense_merge(family: str, tmp_path: Path) -> None:
    build = handmade.tiny_gpt2 if family == "gpt2" else handmade.tiny_llama
    pick = handmade.with_embeddings if family == "embeddings" else handmade.every_linear
    made = handmade.write(build(), tmp_path / "out", bits=mixed_bits, pick=pick, task_type="CAUSAL_LM")
    model, expected = load(made.folder), adapted_twin(made)
    start = logits(expected)
    assert torch.equal(logits(model), start)
    for act in (
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(LoftqError, match=r"call `model\.dequantize\(\)` first"):
            act()
    assert torch.equal(logits(model), start), "a refused merge changes nothing"
    model.base_model.model.dequantize()
    assert torch.equal(logits(model), start)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    merged, theirs = model.merge_and_unload(), expected.merge_and_unload()
    ours, theirs = dict(merged.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_dequantizing_first_and_adapting_then(tmp_path: Path) -> None:
    made = handmade.write(handmade.tiny_gpt2(), tmp_path / "out", bits=mixed_bits)
    backbone = load(made.folder, adapter=False)
    backbone.dequantize()
    model = PeftModel.from_pretrained(backbone, made.folder, subfolder="loftq_init")
    assert torch.equal(logits(model.merge_and_unload()), logits(adapted_twin(made).merge_and_unload()))


def test_unloading_and_saving_the_adapter(llama: handmade.Handmade, tmp_path: Path) -> None:
    model = load(llama.folder, trainable=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == llama.adapter.keys()
    assert all(torch.equal(saved[key], llama.adapter[key]) for key in saved)
    assert torch.equal(logits(model.unload()), logits(llama.twin))


# --- as another class --------------------------------------------------------------------------------------------


def deltas(model: nn.Module, modules: Iterable[str]) -> list[Tensor]:
    return [model.get_base_model().get_submodule(path).get_delta_weight("default") for path in modules]


@pytest.mark.parametrize("wanted", ["AutoModel", AutoModelForSequenceClassification, transformers.LlamaForCausalLM])
def test_the_class_can_be_chosen(wanted: object, llama: handmade.Handmade) -> None:
    model = load(llama.folder, auto_class=wanted, trainable=True)
    base = model.get_base_model()
    prefix = "" if wanted == "AutoModel" else "model."
    paths = [prefix + path.removeprefix("model.") for path in llama.modules]
    expected = {"AutoModel": "LlamaModel", transformers.LlamaForCausalLM: "LlamaForCausalLM"}
    assert type(base).__name__ == expected.get(wanted, "LlamaForSequenceClassification")
    for path, matrix, delta in zip(paths, llama.matrices, deltas(model, paths)):
        key = f"base_model.model.{matrix.module}"
        a, b = (llama.adapter[f"{key}.lora_{name}.weight"] for name in "AB")
        assert torch.equal(delta, b @ a)
        assert isinstance(base.get_submodule(path).base_layer, LoftqLinear)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trainable if ".lora_" not in name}
    assert len(trainable - heads) == 2 * len(paths)
    assert bool(heads) == (wanted is AutoModelForSequenceClassification)


def test_a_classifier_starts_with_its_own_head_and_saves_it(tmp_path: Path) -> None:
    made = handmade.write(handmade.tiny_bert(), tmp_path / "out")
    model = load(made.folder, auto_class="AutoModelForSequenceClassification", trainable=True, num_labels=3)
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    output = model(input_ids=tokens(), labels=torch.tensor([0, 2]))
    output.loss.backward()
    assert model.get_base_model().classifier.modules_to_save["default"].weight.grad is not None
    model.save_pretrained(tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], model.get_base_model().classifier.weight)


def test_a_checkpoint_of_the_bare_model_gets_a_head(tmp_path: Path) -> None:
    made = handmade.write(handmade.tiny_llama(cls="LlamaModel"), tmp_path / "out")
    model = load(made.folder)
    assert type(model) is PeftModel and type(model.get_base_model()).__name__ == "LlamaModel"
    model = load(made.folder, auto_class="AutoModelForCausalLM")
    assert type(model).__name__ == "PeftModelForCausalLM"
    paths = [f"model.{path}" for path in made.modules]
    twin = adapted_twin(made)
    assert all(torch.equal(a, b) for a, b in zip(deltas(model, paths), deltas(twin, made.modules)))
    assert torch.equal(logits(model.get_base_model().model), logits(twin))


def test_adapters_of_modules_the_class_lacks_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def pick(path: str, module: nn.Module) -> bool:
        return path == "lm_head" or handmade.with_embeddings(path, module)

    made = handmade.write(handmade.tiny_llama(), tmp_path / "out", pick=pick, task_type="CAUSAL_LM")
    twin = adapted_twin(made)
    assert torch.equal(logits(load(made.folder)), logits(twin))
    with caplog.at_level(logging.WARNING, logger="loftq_cli"):
        model = load(made.folder, auto_class="AutoModel")
    assert "LlamaModel has no lm_head" in caplog.text
    assert torch.equal(logits(model), logits(twin.get_base_model().model))


def test_a_pattern_instead_of_a_list_of_modules(llama: handmade.Handmade, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "out")
    config = json.loads((folder / "loftq_init/adapter_config.json").read_text())
    config["target_modules"] = "|".join(path.replace(".", r"\.") for path in config["target_modules"])
    (folder / "loftq_init/adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder)), logits(load(llama.folder)))
    assert len(adapter_of(load(folder, auto_class="AutoModel"))) == len(llama.adapter)


# --- options and refusals ----------------------------------------------------------------------------------------


def test_placement_and_dtype_are_passed_on(llama: handmade.Handmade, tmp_path: Path) -> None:
    expected = logits(load(llama.folder))
    for device_map in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        assert torch.equal(logits(load(llama.folder, device_map=device_map)), expected)
    model = load(llama.folder, dtype=torch.bfloat16)
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in adapter_of(model).values())
    disk = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(LoftqError, match="offloaded to disk"):
        load(llama.folder, device_map=disk, offload_folder=str(tmp_path))
    backbone = load(llama.folder, device_map=disk, offload_folder=str(tmp_path), adapter=False)
    assert torch.equal(logits(backbone), logits(llama.twin))


@pytest.fixture
def copied(llama: handmade.Handmade, tmp_path: Path) -> Path:
    return shutil.copytree(llama.folder, tmp_path / "out")


def test_unfinished_and_foreign_directories(copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(LoftqError, match=r"is not a converted model: there is no config\.json"):
        load(copied)
    (copied / ".loftq").mkdir()
    with pytest.raises(LoftqError, match="unfinished: run the same `loftq quantize` command again"):
        load(copied)


def test_an_adapter_of_another_conversion_is_refused(copied: Path) -> None:
    file = copied / "loftq_init" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt", "loftq_fingerprint": "other"})
    with pytest.raises(LoftqError, match="come from different conversions"):
        load(copied)
    load(copied, adapter=False)
    save_file(tensors, file, metadata={"format": "pt"})  # an adapter saved by PEFT has no fingerprint
    load(copied)


def test_incomplete_adapters_are_refused(copied: Path) -> None:
    file = copied / "loftq_init" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    words = "1 of the model's are not in the file"
    with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(LoftqError, match=words):
        load(copied)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": lost}, file)
    with pytest.warns(UserWarning), pytest.raises(LoftqError, match="1 of its weights are not in the model"):
        load(copied)
    save_file({"base_model.model.elsewhere.lora_A.weight": lost}, file)
    with pytest.raises(LoftqError, match="no module in common"):
        load(copied)
    shutil.rmtree(copied / "loftq_init")
    with pytest.raises(LoftqError, match="adapter=False"):
        load(copied)


def test_a_backbone_that_lost_a_matrix_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_absmax"]
    save_file(tensors, file, metadata={"format": "pt", "loftq_fingerprint": "same"})
    with pytest.raises(LoftqError, match=r"1 packed matrices .*up_proj\.weight_absmax"):
        load(copied)


def test_a_packed_matrix_that_would_land_in_a_dense_layer_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (group,) = (group for group in config["quantization_config"]["groups"] if group["bits"] == 8)
    group["modules"].pop(0)  # at 8 bits the codes have the shape of the weight
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoftqError, match=r"1 packed matrices .*could not be loaded into LlamaForCausalLM"):
        load(copied)


@pytest.mark.parametrize(("module", "extra"), [("peft", ""), ("bitsandbytes", "[bnb]")])
def test_missing_libraries_are_named(module: str, extra: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copied / "config.json").write_text(json.dumps(config))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    command = re.escape(f"pip install 'loftq-cli{extra} @ git")
    with pytest.raises(LoftqError, match=rf"{module} is needed .*: run `{command}[^ ]*'`\."):
        load(copied)


@pytest.mark.parametrize("adapter", [True, False, "trained"])
@pytest.mark.parametrize("name", ["nodir", "./nodir", "/no/such/dir", "a/b/c", "out put/x", "org/nodir/", "~/nodir"])
def test_what_is_no_directory_is_said_at_once(
    name: str, adapter: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("used the network"))
    with pytest.raises(LoftqError) as caught:
        load(name, adapter=adapter)
    wanted = "give the output of `loftq quantize`, or org/name for a model on the Hub."
    assert str(caught.value) == f"there is no directory {name}: {wanted}"


def test_other_names_that_cannot_be_loaded_end_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoftqError, match=r"^org/name@abc names a revision: load org/name with revision='abc'\.$"):
        load("org/name@abc")
    with pytest.raises(LoftqError, match=r"^there is no directory org/nodir, and no model of that name could be"):
        load("org/nodir", local_files_only=True)


def test_a_hub_id_is_read_from_the_cache(copied: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--someone--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = shutil.copytree(copied, repository / "snapshots" / ("0" * 40))
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert torch.equal(logits(load("someone/llama", **options)), logits(load(copied)))
    weights = load_file(snapshot / "model.safetensors")
    save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt", "loftq_fingerprint": "other"})
    with pytest.raises(LoftqError, match="come from different conversions"):
        load("someone/llama", **options)


def test_unknown_classes_are_refused(llama: handmade.Handmade) -> None:
    for name in ("AutoModelForMagic", "AutoConfigs", "logging"):
        with pytest.raises(LoftqError, match=f"no model class '{name}'"):
            load(llama.folder, auto_class=name)


def test_the_package_exports_load() -> None:
    import loftq_cli

    assert loftq_cli.load is load
