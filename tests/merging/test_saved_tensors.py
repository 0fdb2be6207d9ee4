"""`loftq merge` of adapters that hold whole tensors: new tokens, trained rows, heads, and what has no place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import LoftqError, UsageError

IDS = torch.tensor([[5, 17, 3, 41]])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def backbone(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "out"
    loftq_cli.quantize(random_llama, output=out, bits=4, rank=2, iters=1, format="packed", include=("*.layers.0.*",))
    return out


def changed(backbone: Path, folder: Path, tensors: Callable[[dict], dict], **config: object) -> Path:
    """Return a copy of the initial adapter with other tensors and config fields."""
    shutil.copytree(backbone / "loftq_init", folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))
    save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def check_merged(folder: Path, expected: torch.Tensor, ids: torch.Tensor) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    return model


def test_new_tokens_make_the_vocabulary_larger(backbone: Path, tmp_path: Path) -> None:
    model = loftq_cli.load(backbone, trainable=True)
    size = model.get_base_model().config.vocab_size
    model.get_base_model().resize_token_embeddings(size + 8)
    ids = torch.tensor([[5, size + 3, 3, size - 1]])
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "added_tokens.json").write_text('{"<new>": 99}')
    loftq_cli.merge(backbone, tmp_path / "trained", output=tmp_path / "merged")
    merged = check_merged(tmp_path / "merged", expected, ids)
    assert merged.config.vocab_size == size + 8
    assert (tmp_path / "merged" / "added_tokens.json").exists(), "the tokenizer of the trained model comes along"
    with pytest.raises(UsageError, match="--to requantize cannot store the adapter's own"):
        loftq_cli.merge(backbone, tmp_path / "trained", output=tmp_path / "never", to="requantize")


def test_trained_rows_and_a_head_trained_as_a_whole(backbone: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = loftq_cli.load(backbone, adapter=False)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        layers_to_transform=[0],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [5, 41]},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path / "trained")
    loftq_cli.merge(backbone, tmp_path / "trained", output=tmp_path / "merged")
    check_merged(tmp_path / "merged", expected, IDS)
    embedding = "model.embed_tokens.weight"
    before, after = load_file(backbone / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    rows = (before[embedding] != after[embedding]).any(dim=1).nonzero().flatten().tolist()
    assert rows == [5, 41] and not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_new_classification_head_comes_along(backbone: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    head = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    folder = changed(
        backbone,
        tmp_path / "trained",
        lambda found: {**found, "base_model.model.score.weight": head},
        modules_to_save=["classifier", "score"],
        task_type="SEQ_CLS",
    )
    loftq_cli.merge(backbone, folder, output=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(model.score.weight, head) and model.config.num_labels == 3
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def first(found: dict, factor: str) -> str:
    return next(name for name in found if f"lora_{factor}" in name)


HELD: dict[str, tuple[Callable[[dict], dict], dict, str]] = {
    "no place": (
        lambda found: {**found, "base_model.model.model.layers.0.extra.weight": torch.ones(2)},
        {},
        "which has no place in the backbone",
    ),
    "other width": (
        lambda found: {**found, "base_model.model.model.embed_tokens.weight": torch.ones(96, 3)},
        {},
        "but model.embed_tokens.weight has torch.float32",
    ),
    "embedding without head": (
        lambda found: {**found, "base_model.model.model.embed_tokens.weight": torch.ones(104, 64)},
        {},
        "but does not hold lm_head.weight",
    ),
    "promised module": (lambda found: found, {"modules_to_save": ["lm_head"]}, "'lm_head' as trained as a whole"),
    "promised rows": (lambda found: found, {"trainable_token_indices": [1]}, "lists trained tokens"),
    "row beyond the table": (
        lambda found: {
            **found,
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 64),
        },
        {"trainable_token_indices": [10**6]},
        "which does not fit 1 tokens",
    ),
    "not a number": (
        lambda found: {**found, first(found, "A"): torch.full_like(found[first(found, "A")], float("nan"))},
        {},
        "contains NaN or infinity: train the adapter again",
    ),
    "flat factor": (
        lambda found: {**found, first(found, "B"): torch.ones(64)},
        {},
        "but must be a floating-point matrix",
    ),
    "one matrix twice": (
        lambda found: {**found, **{n.replace(".model.model.", ".model.xx.model."): 9 * t for n, t in found.items()}},
        {},
        "down_proj twice, as model.layers.0.mlp.down_proj and as xx.model.layers.0.mlp.down_proj: remove one",
    ),
    "huge factors": (
        lambda found: {name: torch.full_like(tensor, 1e30) for name, tensor in found.items()},
        {},
        "would contain NaN or infinity after the merge",
    ),
    "other rank": (lambda found: found, {"r": 4}, "have rank 2, but "),
}


@pytest.mark.parametrize("what", HELD)
def test_what_cannot_be_used_is_refused(what: str, backbone: Path, tmp_path: Path) -> None:
    tensors, config, said = HELD[what]
    folder = changed(backbone, tmp_path / "adapter", tensors, **config)
    with pytest.raises(LoftqError) as caught:
        loftq_cli.merge(backbone, folder, output=tmp_path / "never")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "never" / "config.json").exists()


def test_float16_overflow_is_refused_by_name(backbone: Path, tmp_path: Path) -> None:
    folder = changed(backbone, tmp_path / "big", lambda found: {n: t * 0 + 500.0 for n, t in found.items()})
    said = r"\.weight holds numbers up to .*, which float16 cannot represent: choose another --dtype"
    with pytest.raises(LoftqError, match=said):
        loftq_cli.merge(backbone, folder, output=tmp_path / "never", dtype="float16")
    assert loftq_cli.merge(backbone, folder, output=tmp_path / "merged").worst_error == 0.0
