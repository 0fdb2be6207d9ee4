"""Models whose code reads the weight of a linear layer: quantized where the loaded layer satisfies that code."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import Family
from support.interruptions import RECIPE, stop_after, tensors
from support.loading import load_plainly, place_of
from support.weight_readers import DTYPE_READERS, FLOAT32, JAMBA, NLLB_MOE
from torch import nn

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats.container import Container
from loftq_cli.planning import output_files
from loftq_cli.runtime.weight_dtype import DtypeLinear

FORMS = {"packed": 2, "dense": 3, "compressed-tensors": 4, "bnb": 4}
SMALL = {"rank": 8, "iters": 1}


def output(model: nn.Module, family: Family) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**family.dummy_inputs(model))
    return next(value for value in found.values() if isinstance(value, torch.Tensor)).float()


def reference(family: Family, out: Path, manifest: Manifest) -> torch.Tensor:
    """The output of the source model with Q + BA, as the files hold them."""
    twin = family()
    with torch.no_grad():
        for record in manifest.matrices:
            place_of(twin, record).copy_(decode_matrix(out, manifest, record) + decode_product(out, manifest, record))
    return output(twin, family)


def readers(manifest: Manifest) -> tuple[set[str], dict[str, str]]:
    """The quantized layers whose weight the code reads, and the reasons of those in full precision."""
    names = ("wo", "fc2", "dt_proj")
    quantized = {record.module for record in manifest.matrices if record.module.endswith(names)}
    kept = {record.module: record.reason for record in manifest.kept if (record.module or "").endswith(names)}
    return quantized, kept


@pytest.mark.parametrize("name", DTYPE_READERS)
def test_start_is_right_in_every_container(name: str, tmp_path: Path) -> None:
    family = DTYPE_READERS[name]
    source = tmp_path / "source"
    family().save_pretrained(source)
    include = ("*",) if name == "pix2struct" else ()  # its vision tower has such layers, too
    for form, bits in FORMS.items():
        out = tmp_path / form
        if form == "compressed-tensors":
            pytest.importorskip("compressed_tensors")
        manifest = loftq_cli.quantize(source, output=out, bits=bits, format=form, include=include, **SMALL)
        quantized, kept = readers(manifest)
        loaded = load_plainly(out, family.auto_class)
        expected = reference(family, out, manifest)
        assert torch.allclose(output(loaded, family), expected, atol=2e-5, rtol=2e-5), form
        if form == "bnb":
            reason = "kept in float32 by transformers" if name in FLOAT32 else "its weight's dtype is read by "
            assert not quantized and all(found.startswith(reason) for found in kept.values())
            [note] = [note for note in manifest.notes if "--format packed, compressed-tensors or dense" in note]
            assert note.startswith(f"{len(kept)} matrices stay in full precision") and next(iter(kept.values())) in note
        else:
            assert len(quantized) >= 2 and not kept


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_t5_in_half_precision_computes_wo_as_transformers_does(form: str, dtype: str, tmp_path: Path) -> None:
    family = DTYPE_READERS["t5_gated"]
    family().to(getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(tmp_path / "source", output=out, bits=2, format=form, **SMALL)
    loaded = load_plainly(out, family.auto_class)
    layer = loaded.get_base_model().encoder.block[0].layer[1].DenseReluDense.wo
    seen = []
    layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    expected = reference(family, out, manifest)
    assert (output(loaded, family) - expected).norm() < 0.03 * expected.norm()
    wide = torch.float32 if dtype == "float16" else torch.bfloat16
    assert set(seen) == {wide} and layer.weight.dtype is wide


def test_float16_compressed_tensors_leave_float32_layers_alone(tmp_path: Path) -> None:
    """transformers unpacks into the model's dtype, but keeps T5's `wo` in float32 in a float16 model."""
    for name, there in (("t5", False), ("longt5", True)):
        DTYPE_READERS[name]().save_pretrained(tmp_path / name)
        recipe = {"bits": 4, "format": "compressed-tensors", **SMALL}
        plan = loftq_cli.plan(tmp_path / name, dtype="float16", **recipe)
        assert any(unit.module.endswith(".wo") for unit in plan.matrices) == there
        assert any(unit.module.endswith(".wo") for unit in loftq_cli.plan(tmp_path / name, **recipe).matrices)
        packed = loftq_cli.plan(tmp_path / name, dequantize=False, **recipe)
        assert not any(unit.module.endswith(".wo") for unit in packed.matrices)


def test_bitsandbytes_would_cast_activations_to_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers behind `bnb` leaving these layers alone: the loader refuses them, or the output is wrong."""
    family = DTYPE_READERS["longt5"]
    family().save_pretrained(tmp_path / "source")
    with monkeypatch.context() as patched:
        patched.setattr(Container, "unmet", lambda *_, **__: None)
        manifest = loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=4, format="bnb", **SMALL)
        DTYPE_READERS["t5"]().save_pretrained(tmp_path / "listed")
        loftq_cli.quantize(tmp_path / "listed", output=tmp_path / "refused", bits=4, format="bnb", **SMALL)
    expected = reference(family, tmp_path / "out", manifest)
    actual = output(load_plainly(tmp_path / "out", family.auto_class), family)
    assert (actual - expected).norm() > 0.5 * expected.norm()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_plainly(tmp_path / "refused", family.auto_class)


def test_a_model_that_checks_for_packed_weights_needs_nothing(tmp_path: Path) -> None:
    NLLB_MOE().save_pretrained(tmp_path / "source")
    manifest = loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=4, format="bnb", **SMALL)
    quantized, kept = readers(manifest)
    assert len(quantized) == 2 and not kept


@pytest.mark.parametrize("form", ["packed", "bnb", "compressed-tensors", "dense"])
def test_jamba_uses_the_layer_only_in_a_model_with_a_quantizer(form: str, tmp_path: Path) -> None:
    JAMBA().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(tmp_path / "source", output=out, bits=4, format=form, **SMALL)
    quantized, kept = readers(manifest)
    assert bool(quantized) == (form in ("packed", "bnb"))
    reason = "its weight is read directly by JambaMambaMixer in models without a quantizer"
    assert set(kept.values()) == (set() if quantized else {reason})
    loaded = load_plainly(out, JAMBA.auto_class)
    assert torch.allclose(output(loaded, JAMBA), reference(JAMBA, out, manifest), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", ["packed", "dense", "compressed-tensors"])
def test_the_adapter_trains_and_comes_back(form: str, tmp_path: Path) -> None:
    family = DTYPE_READERS["t5_gated"]
    family().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    loftq_cli.quantize(tmp_path / "source", output=out, bits=4, format=form, **SMALL)
    model = loftq_cli.load(out, trainable=True)
    adapter = [(name, value) for name, value in model.named_parameters() if ".wo.lora_" in name]
    assert len(adapter) == 4 and all(value.requires_grad for _, value in adapter)
    before = {name: value.detach().clone() for name, value in adapter}
    optimizer = torch.optim.SGD([value for _, value in adapter], lr=1.0)
    inputs = family.dummy_inputs(model)
    model(**inputs, labels=torch.tensor([[5, 17, 3]])).loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for _, value in adapter)
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in adapter)
    trained = output(model, family)
    model.save_pretrained(tmp_path / "trained")
    again = loftq_cli.load(out, adapter=tmp_path / "trained")
    assert torch.equal(output(again, family), trained)
    merged = tmp_path / "merged"
    loftq_cli.merge(out, tmp_path / "trained", output=merged, to="dense")
    whole = loftq_cli.load(merged, adapter=False)
    assert torch.allclose(output(whole, family), trained, atol=2e-5, rtol=2e-5)


def test_merge_leaves_float32_layers_in_float32(tmp_path: Path) -> None:
    DTYPE_READERS["t5"]().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    loftq_cli.quantize(tmp_path / "source", output=out, bits=4, format="packed", **SMALL)
    loftq_cli.merge(out, out / "loftq_init", output=tmp_path / "merged", to="dense", dtype="float16")
    dtypes = {name: value.dtype for name, value in load_file(tmp_path / "merged" / "model.safetensors").items()}
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] is torch.float32
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wi.weight"] is torch.float16


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_stopped_conversion_resumes_to_the_same_bytes(form: str, tmp_path: Path) -> None:
    DTYPE_READERS["t5_gated"]().save_pretrained(tmp_path / "source")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    loftq_cli.quantize(tmp_path / "source", output=whole, format=form, **RECIPE)
    stop_after(5, tmp_path / "source", resumed, format=form)
    manifest = loftq_cli.quantize(tmp_path / "source", output=resumed, format=form, **RECIPE)
    assert tensors(whole) == tensors(resumed)
    assert any(record.module.endswith(".wo") for record in manifest.matrices)
    assert loftq_cli.verify(resumed, source=tmp_path / "source").ok


def as_version_0_1(patched: pytest.MonkeyPatch) -> None:
    """Keep every layer with needs in full precision, as loftq 0.1 did."""
    patched.setattr(Container, "unmet", lambda _self, needs, **_options: needs[0] if needs else None)
    patched.setattr(output_files, "_later_choices", lambda *_: "")


def test_outputs_of_version_0_1_load_and_verify_and_are_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = DTYPE_READERS["t5_gated"]
    source = tmp_path / "source"
    family().save_pretrained(source)
    with monkeypatch.context() as patched:
        as_version_0_1(patched)
        for form in ("packed", "bnb"):
            old = loftq_cli.quantize(source, output=tmp_path / form, format=form, **RECIPE)
            assert not readers(old)[0]
            stop_after(5, source, tmp_path / f"half-{form}", format=form)
    for form in ("packed", "bnb"):
        assert loftq_cli.verify(tmp_path / form, source=source).ok
        loaded = loftq_cli.load(tmp_path / form)
        assert not any(isinstance(module, DtypeLinear) for module in loaded.modules())
        output(loaded, family)
    with pytest.raises(UsageError, match="packed holds a finished conversion with another version of loftq"):
        loftq_cli.quantize(source, output=tmp_path / "packed", format="packed", **RECIPE)
    with pytest.raises(UsageError, match="this version of loftq is not the one that the unfinished conversion"):
        loftq_cli.quantize(source, output=tmp_path / "half-packed", format="packed", **RECIPE)
    # Nothing has changed for bnb.
    done = loftq_cli.read_manifest(tmp_path / "bnb")
    assert loftq_cli.quantize(source, output=tmp_path / "bnb", format="bnb", **RECIPE) == done
    loftq_cli.quantize(source, output=tmp_path / "half-bnb", format="bnb", **RECIPE)
    assert tensors(tmp_path / "half-bnb") == tensors(tmp_path / "bnb")


def test_the_class_of_one_tower_loads_packed_layers_that_answer_for_their_dtype(tmp_path: Path) -> None:
    import transformers

    family = DTYPE_READERS["t5_gated"]
    family().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    loftq_cli.quantize(tmp_path / "source", output=out, bits=2, format="packed", **SMALL)
    whole, tower = loftq_cli.load(out), loftq_cli.load(out, auto_class=transformers.T5EncoderModel)
    ids = {"input_ids": torch.tensor([[5, 17, 3]])}
    with torch.no_grad():
        expected = whole.get_base_model().encoder(**ids)[0]
        assert torch.equal(tower.get_base_model()(**ids)[0], expected)


def test_rules_and_filters_reach_these_layers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    DTYPE_READERS["t5"]().save_pretrained(source)
    plan = loftq_cli.plan(source, bits=2, format="packed", rule=(r".*\.wo=8:4",))
    bits = {unit.module.rpartition(".")[2]: unit.matrix.grid.bits for unit in plan.matrices}
    assert bits["wo"] == 8 and bits["wi"] == 2
    plan = loftq_cli.plan(source, bits=2, format="packed", exclude=("*.wo",))
    assert {str(unit.reason) for unit in plan.kept if (unit.module or "").endswith(".wo")} == {"--exclude"}
    with pytest.raises(LoftqError, match=r"nothing in .* \(--include '\*.wo' names only: kept in float32"):
        loftq_cli.plan(source, bits=4, format="bnb", include=("*.wo",))
    both = loftq_cli.plan(source, bits=4, format="bnb", include=("*.wo", "*.q"))
    assert any("--include '*.wo' names only weights that stay in full precision" in note for note in both.notes)
    config = json.loads(both.texts["config.json"])["quantization_config"]
    assert any(entry.endswith("wo") for entry in config["llm_int8_skip_modules"])


def test_integers_and_fitted_levels_are_packed_as_well(tmp_path: Path) -> None:
    family = DTYPE_READERS["t5"]
    family().save_pretrained(tmp_path / "source")
    recipes = ({"data_type": "int"}, {"levels": "fitted", "method": "refined"}, {"method": "qa-lora"})
    for number, recipe in zip(itertools.count(), recipes):
        out = tmp_path / str(number)
        manifest = loftq_cli.quantize(tmp_path / "source", output=out, bits=4, format="packed", **SMALL, **recipe)
        assert readers(manifest)[0] and not readers(manifest)[1]
        loaded = loftq_cli.load(out)
        assert torch.allclose(output(loaded, family), reference(family, out, manifest), atol=2e-5, rtol=2e-5), recipe
