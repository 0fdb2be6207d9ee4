"""Loading as a class other than the converted one: new heads stay trainable, sub-models are found under other names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import loftq_cli
from loftq_cli.errors import LoftqError
from loftq_cli.runtime.paths import find_path, moved_prefixes

_BERT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_READERS = {"bnb": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


def need_reader(form: str) -> None:
    if form in _READERS and importlib.util.find_spec(_READERS[form]) is None:
        pytest.skip(f"{_READERS[form]} is not installed")


@pytest.mark.parametrize("form", ["packed", "bnb", "compressed-tensors", "dense"])
def test_a_new_head_is_a_layer_that_can_be_trained(form: str, tmp_path: Path) -> None:
    need_reader(form)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=96, max_position_embeddings=64, **_BERT)
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=4, rank=8, format=form)
    model = loftq_cli.load(
        tmp_path / "out", trainable=True, auto_class="AutoModelForSequenceClassification", num_labels=3
    )
    output = model(input_ids=torch.tensor([[5, 17, 3, 41]]))
    assert output.logits.shape == (1, 3)
    output.logits.float().sum().backward()
    grads = {name for name, value in model.named_parameters() if value.grad is not None and "lora_" not in name}
    assert any("classifier" in name for name in grads)


@pytest.mark.parametrize("form", ["packed", "bnb", "compressed-tensors", "dense"])
def test_the_text_class_of_a_multimodal_checkpoint_starts_at_the_source(form: str, tmp_path: Path) -> None:
    need_reader(form)
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=_TEXT, vision_config=_VISION, image_token_id=95, video_token_id=94)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    ids = torch.tensor([[5, 17, 3, 41, 8]])
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()(input_ids=ids).logits
        loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=4, rank=256, format=form)
        loaded = loftq_cli.load(tmp_path / "out", auto_class="AutoModelForCausalLM", dtype=torch.float32).eval()
        found = loaded(input_ids=ids).logits
    assert type(loaded.get_base_model()).__name__ == "Qwen3_5ForCausalLM"
    assert (found - wanted).norm() / wanted.norm() < 1e-3


@pytest.mark.parametrize("form", ["packed", "bnb", "compressed-tensors", "dense"])
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_one_tower_of_a_composite_checkpoint_starts_at_the_source(form: str, name: str, tmp_path: Path) -> None:
    need_reader(form)
    torch.manual_seed(0)
    sizes = {**_BERT, "projection_dim": 64}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 96, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=64,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "source")
    loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=4, rank=64, format=form)
    ids = torch.tensor([[5, 17, 3, 95]])
    with torch.no_grad():
        wanted = getattr(transformers, name).from_pretrained(tmp_path / "source").eval()(input_ids=ids)[0]
        found = loftq_cli.load(tmp_path / "out", auto_class=name, dtype=torch.float32).eval()(input_ids=ids)[0]
    assert (found - wanted).norm() / wanted.norm() < 1e-3
    with pytest.raises(LoftqError, match=r"in common with CLIPVisionModel|is in CLIPVisionModel"):
        loftq_cli.load(tmp_path / "out", auto_class="CLIPVisionModel")


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_vision_tower_that_was_included_starts_at_the_source(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text, vision = {**_BERT, "vocab_size": 96, "max_position_embeddings": 32}, {**_BERT, "image_size": 28}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config={**vision, "patch_size": 14})
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / "source")
    how = {"bits": 4, "rank": 64, "iters": 1, "format": "packed", "include": ("vision_model*",)}
    loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", **how)
    image, tower = torch.randn(1, 3, 28, 28), f"{name}VisionModel"
    with torch.no_grad():
        wanted = getattr(transformers, tower).from_pretrained(tmp_path / "source").eval()(image)[0]
        found = loftq_cli.load(tmp_path / "out", auto_class=tower, dtype=torch.float32).eval()(image)[0]
    assert (found - wanted).norm() / wanted.norm() < 1e-3


def test_a_moved_prefix_is_found_in_both_kinds_of_names() -> None:
    config = transformers.Qwen3_5TextConfig(**_TEXT)
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(config)
    moved = moved_prefixes(model, ["model.language_model.layers.0.mlp.up_proj.weight", "model.visual.x.weight"])
    assert moved == {"model.language_model.": "model."}
    present = {"model.layers.0.mlp.up_proj"}
    assert find_path("model.language_model.layers.0.mlp.up_proj", present, "model", moved) in present
    assert find_path("model.visual.layers.0.mlp.up_proj", present, "model", moved) is None
