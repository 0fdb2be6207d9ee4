"""Training: every format that claims it learns on real text, with the gradients of its dense twin, in real trainers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.trained_llama import CHECKPOINT

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix
from loftq_cli.artifacts.manifest import Manifest

LAYERS = ("*.layers.0.*", "*.layers.5.*")  # of six: enough to learn with, and quick
RECIPES = {
    "packed 2-bit nf": {"bits": 2},
    "packed 3-bit nf": {"bits": 3},
    "packed mixed": {"bits": 2.5, "rank_budget": 8},
    "packed 2-bit int": {"bits": 2, "data_type": "int", "format": "packed"},
    "packed 2-bit qa-lora": {"bits": 2, "method": "qa-lora", "group_size": 32},
    "dense 2-bit nf": {"bits": 2, "format": "dense"},
    # bitsandbytes computes in the dtype it was written for, whatever the model is loaded in.
    "bnb 4-bit": {"bits": 4, "dtype": "float32"},
    "bnb 4-bit double quantization": {"bits": 4, "double_quant": True, "dtype": "float32"},
    "compressed-tensors 4-bit": {"bits": 4, "format": "compressed-tensors", "group_size": 64},
    "gptq 4-bit": {"bits": 4, "format": "gptq", "group_size": 64},
}
NEEDS = {"bnb": ("bitsandbytes",), "compressed-tensors": ("compressed_tensors",), "gptq": ("gptqmodel", "optimum")}


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # gptqmodel's kernels would be compiled


def need(name: str) -> None:
    for package in NEEDS.get(name.split()[0], ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package}, which reads this format, is not installed")


def rate(name: str, model: Path) -> float:
    """Pooled adapters of the shipped checkpoint have four or eight inputs and need larger steps to learn as much."""
    return 0.1 if "qa-lora" in name and model == CHECKPOINT else 5e-3


def batches(model: Path, text: str) -> torch.Tensor:
    """WikiText-2, [4, 96]."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text[:4000], return_tensors="pt").input_ids
    return ids[0, : 4 * 96].reshape(4, 96)


def dense_twin(source: Path, out: Path, manifest: Manifest) -> torch.nn.Module:
    """The source model with Q in place of W and the same adapter, in float32."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    from loftq_cli.runtime.pooled import with_pooled_layers

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for record in manifest.matrices:
        model.get_submodule(record.module).weight.data = decode_matrix(out, manifest, record)
    home = out / "loftq_init"
    config = with_pooled_layers(LoraConfig.from_pretrained(home))
    return PeftModel.from_pretrained(model, home, config=config, is_trainable=True)


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_it_learns_with_the_gradients_of_its_dense_twin(
    name: str, small_llama: Path, wikitext: str, tmp_path: Path
) -> None:
    need(name)
    out = tmp_path / "out"
    recipe = {"rank": 8, "iters": 1, "include": LAYERS, **RECIPES[name]}
    manifest = loftq_cli.quantize(small_llama, output=out, **recipe)
    assert len(manifest.matrices) == 14
    ids = batches(small_llama, wikitext)
    model = loftq_cli.load(out, trainable=True, dtype=torch.float32).train()
    loss, ours = gradients(model, ids)
    twin_loss, theirs = gradients(dense_twin(small_llama, out, manifest).train(), ids)
    # gptqmodel multiplies in float16.
    tolerance = 2e-2 if name.startswith("gptq") else 1e-5
    assert loss == pytest.approx(twin_loss, rel=tolerance)
    assert len(ours) == 28 and ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert (ours[key] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, key

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate(name, small_llama))
    losses = [loss]
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        losses.append(gradients(model, ids)[0])
    assert losses[-1] < losses[0] - 0.05, losses

    model.save_pretrained(tmp_path / "saved")
    again = loftq_cli.load(out, adapter=tmp_path / "saved", dtype=torch.float32)
    kept = {n: p for n, p in again.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if "lora_" in n) and len(kept) == 28
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again(ids).logits)
    stored = load_file(out / "loftq_init" / "adapter_model.safetensors")
    assert not any(torch.equal(stored[n.replace(".default", "")], p) for n, p in kept.items()), "all of it learned"


def snippet_model(out: Path) -> torch.nn.Module:
    """What the card's own code loads."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(code, scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    return model


def converted(name: str, small_llama: Path, tmp_path: Path) -> Path:
    need(name)
    recipe = {"rank": 8, "iters": 1, "include": ("*.layers.5.*",), **RECIPES[name]}
    loftq_cli.quantize(small_llama, output=tmp_path / "out", **recipe)
    return tmp_path / "out"


TRAINED = [
    "packed 2-bit nf", "packed 2-bit qa-lora", "bnb 4-bit", "dense 2-bit nf", "compressed-tensors 4-bit", "gptq 4-bit"
]  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_trainer_runs_with_the_cards_snippet(
    name: str, checkpointing: bool, small_llama: Path, wikitext: str, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    model = snippet_model(converted(name, small_llama, tmp_path))
    rows = [{"input_ids": row, "labels": row} for row in batches(small_llama, wikitext)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4,
        learning_rate=rate(name, small_llama), logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        gradient_checkpointing=checkpointing,
        disable_tqdm=True, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.02, losses
    trainer.save_model(str(tmp_path / "saved"))
    again = loftq_cli.load(tmp_path / "out", adapter=tmp_path / "saved")
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, trained[n]) for n, p in again.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", ["packed 2-bit nf", "packed 2-bit qa-lora", "bnb 4-bit"])
def test_sft_trainer_runs_with_the_cards_snippet(name: str, small_llama: Path, wikitext: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed (extra 'dev')")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    out = converted(name, small_llama, tmp_path)
    model = snippet_model(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token = tokenizer.eos_token
    lines = [line for line in wikitext.split("\n") if len(line) > 200][:4]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4,
        learning_rate=rate(name, small_llama), max_length=96, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False,
        lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"text": lines}), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.02, losses
