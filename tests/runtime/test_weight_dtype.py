"""Packed layers for code that reads a weight's dtype: what they answer, and that no library mistakes the answer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import handmade
from support.handmade import logits
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.core_model_loading import WeightRenaming

from loftq_cli.errors import LoftqError
from loftq_cli.runtime.weight_dtype import DtypeLinear, StandIn, renaming

WO = "encoder.block.0.layer.1.DenseReluDense.wo"
BITS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> handmade.Handmade:
    folder = tmp_path_factory.mktemp("t5") / "out"
    return handmade.write(handmade.tiny_t5(), folder, bits=lambda index: BITS[index % 4])


def load(made: handmade.Handmade, **options: object) -> nn.Module:
    model = AutoModelForSeq2SeqLM.from_pretrained(made.folder, **options)
    assert isinstance(model.get_submodule(WO), DtypeLinear)
    return model


def test_the_stand_in_has_dtype_shape_and_device_and_no_values(made: handmade.Handmade) -> None:
    layer = load(made).get_submodule(WO)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and type(weight) is StandIn
    assert (weight.dtype, tuple(weight.shape), weight.device.type) == (torch.float32, (32, 48), "cpu")
    assert weight.is_floating_point() and not weight.requires_grad and weight.dim() == 2 and weight.numel() == 32 * 48
    assert weight.data is weight and "weight" not in dict(layer.named_parameters())
    assert layer.codes.dtype is torch.uint8
    for use in (
        lambda: weight + 1,
        lambda: weight.data.clone(),
        lambda: weight.float(),
        lambda: F.linear(torch.zeros(1, 48), weight),
        lambda: torch.zeros(1, 48) @ weight.T,
        lambda: weight.data.__iadd__(1),
        lambda: weight.sum(),
        lambda: weight[0],
    ):
        with pytest.raises(LoftqError, match=r"weight is packed.*model\.dequantize\(\)"):
            use()


def test_the_answer_follows_casts_as_a_dense_weight_does(made: handmade.Handmade) -> None:
    model, dense = load(made), nn.Linear(1, 1)
    layer = model.get_submodule(WO)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert layer.weight.dtype is dense.to(dtype).weight.dtype
        assert layer.codes.dtype is torch.uint8 and layer.weight_absmax.dtype is torch.float32
    assert model.to("meta").get_submodule(WO).weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_reach_the_layer_in_the_dtype_of_the_dense_model(
    dtype: torch.dtype, made: handmade.Handmade, tmp_path: Path
) -> None:
    made.twin.save_pretrained(tmp_path)
    packed, dense = load(made, dtype=dtype), AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype)
    assert packed.get_submodule(WO).weight.dtype is dense.get_submodule(WO).weight.dtype
    assert torch.equal(logits(packed), logits(dense))
    packed.dequantize()
    for (name, ours), (_, theirs) in zip(packed.named_parameters(), dense.named_parameters()):
        assert ours.dtype is theirs.dtype and torch.equal(ours, theirs), name


def test_copies_and_pickles_answer_too(made: handmade.Handmade) -> None:
    model = load(made)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)


def test_offloading_leaves_the_codes_alone(made: handmade.Handmade) -> None:
    """accelerate casts what it brings back to the dtype of the attribute that it finds under the parameter's name."""
    from accelerate import cpu_offload

    expected = logits(load(made))
    model = load(made)
    cpu_offload(model, torch.device("cpu"))
    assert model.get_submodule(WO).codes.device.type == "meta"
    assert torch.equal(_run(model), expected)


def _run(model: nn.Module) -> torch.Tensor:
    ids = handmade.tokens()
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids)[0]


def test_peft_wraps_merges_and_unmerges_as_with_other_packed_layers(made: handmade.Handmade) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(made), peft.LoraConfig(r=2, target_modules=["wo"], init_lora_weights=False))
    layer = model.get_base_model().get_submodule(WO)
    assert layer.weight.dtype is torch.float32 and layer.lora_A["default"].weight.dtype is torch.float32
    expected = _run(model)
    for safe in (True, False):
        with pytest.raises(LoftqError, match=r"model\.dequantize\(\)"):
            layer.merge(safe_merge=safe)
    model.get_base_model().dequantize()
    model.merge_adapter()
    assert torch.allclose(_run(model), expected, atol=1e-5)


def test_names_are_turned_back_when_the_model_is_saved() -> None:
    assert renaming([], "model") is None
    there = renaming(["model.a.0.wo", "model.b-1.wo"], "model")
    assert isinstance(there, WeightRenaming)
    for name in ("model.a.0.wo", "a.0.wo", "model.b-1.wo"):
        assert there.rename_source_key(f"{name}.weight")[0] == f"{name}.codes"
        assert there.reverse_transform().rename_source_key(f"{name}.codes")[0] == f"{name}.weight"
    for name in ("a.0.wo.weight_absmax", "a.1.wo.weight", "c.a.0.wo.weight"):
        assert there.rename_source_key(name)[0] == name
