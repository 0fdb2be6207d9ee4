"""Every family through the whole pipeline: converted, loaded with its own class and PEFT, compared to a dense twin."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.loading import check_start, load_plainly, place_of

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product

# Families that are converted to every container: one for each kind of layout.
EVERY_FORMAT = (
    "llama",
    "llama_tied",
    "gpt2",
    "t5",
    "bart",
    "deberta_v2",
    "bert",
    "opt",
    "phi3",
    "qwen2_moe",
    "gpt_oss",
)


def first_output(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return next(value for value in output.values() if isinstance(value, torch.Tensor)).float()


def twin_of(model, path: Path, manifest):
    """The source model with every quantized W replaced by Q + BA, as the files hold them."""
    with torch.no_grad():
        for record in manifest.matrices:
            approximation = decode_matrix(path, manifest, record) + decode_product(path, manifest, record)
            place_of(model, record).copy_(approximation)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family()
    source = tmp_path / "source"
    model.save_pretrained(source)
    reference = first_output(model, family.dummy_inputs(model))
    for form in ("packed", "dense", "bnb") if name in EVERY_FORMAT else ("packed",):
        out = tmp_path / form
        manifest = loftq_cli.quantize(source, output=out, bits=2, rank=8, iters=2, format=form)
        assert not any("transformers ignores" in note for note in manifest.notes), manifest.notes
        loaded = load_plainly(out, family.auto_class).eval()
        check_start(out, manifest, loaded, model)
        twin = twin_of(family(), out, manifest)
        expected = first_output(twin, family.dummy_inputs(twin))
        actual = first_output(loaded, family.dummy_inputs(loaded))
        assert torch.allclose(actual, expected, atol=2e-4, rtol=2e-4), (form, (actual - expected).abs().max())
        assert not torch.allclose(expected, reference), "the weights did change"
        check_every_linear(model, manifest, form)
        check_every_expert(model, manifest)


def check_every_linear(model, manifest, form: str) -> None:
    """Every linear layer is quantized and adapted, or listed with a reason."""
    from transformers.pytorch_utils import Conv1D

    quantized = {record.module: record for record in manifest.matrices}
    reasons = {record.module: record.reason for record in manifest.kept if record.module}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for module, layer in model.named_modules():
        if not isinstance(layer, (torch.nn.Linear, Conv1D)) or f"{module}.weight" in tied:
            continue
        if module in quantized:
            assert quantized[module].rank == min(8, *quantized[module].shape)
        else:
            assert reasons.get(module), f"{module} is neither quantized nor listed with a reason ({form})"


def check_every_expert(model, manifest) -> None:
    """Every element of a stacked parameter belongs to exactly one quantized matrix, or the tensor has a reason."""
    covered: Counter[str] = Counter()
    for record in manifest.matrices:
        covered[record.parameter] += record.shape[0] * record.shape[1] if record.expert else 0
    reasons = {record.module: record.reason for record in manifest.kept if record.kind == "expert"}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name and "bias" not in name:
            assert covered[name] == parameter.numel() or reasons.get(name), name


def test_conv1d_is_quantized_along_its_input(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]; blocks and adapter still run along the input."""
    FAMILIES["gpt2"]().save_pretrained(tmp_path / "source")
    manifest = loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=4, format="dense", rank=4)
    shapes = {record.module.split(".")[-1]: record.shape for record in manifest.matrices if "attn" in record.module}
    assert shapes["c_attn"] == (192, 64)
    assert '"fan_in_fan_out": true' in (tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text()


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    FAMILIES["llama_tied"]().save_pretrained(tmp_path / "source")
    recipe = {"bits": 2, "embeddings": "adapt", "lm_head": "quantize"}
    manifest = loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", **recipe)
    kept = {record.tensor: record.reason for record in manifest.kept}
    assert "tied" in kept["model.embed_tokens.weight"]
    model = load_plainly(tmp_path / "out", "AutoModelForCausalLM").base_model.model
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_floating_point()


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "t5", "bert_mlm", "opt", "gpt2"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_tied_table_is_quantized_once_for_all_its_uses(name: str, form: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(
        tmp_path / "source", output=out, bits=2, rank=4, format=form, embeddings="quantize", lm_head="quantize"
    )
    [table] = [record for record in manifest.matrices if record.kind == "embedding"]
    loaded, twin = load_plainly(out, family.auto_class).eval(), family()
    with torch.no_grad():
        for record in manifest.matrices:
            q = decode_matrix(out, manifest, record)
            place_of(twin, record).copy_(q + decode_product(out, manifest, record) if record.rank else q)
    backbone = loaded.get_base_model()
    ties = [key for pair in twin.all_tied_weights_keys.items() for key in pair if key.endswith(".weight")]
    shared = {key.removesuffix(".weight") for key in ties}
    assert table.rank == 0 and table.module in shared
    weights = {id(backbone.get_submodule(path)._parameters["weight"]) for path in shared}
    assert len(weights) == 1, "one weight in memory"
    stored = [key for key in load_file(out / "model.safetensors") if key.startswith(tuple(f"{p}.w" for p in shared))]
    assert len(stored) == (2 if form == "packed" else 1)
    inputs = family.dummy_inputs(twin)
    assert torch.allclose(first_output(loaded, inputs), first_output(twin, inputs), atol=2e-4, rtol=2e-4)


def test_a_tied_table_is_the_same_from_a_pickle(tmp_path: Path) -> None:
    """A pickle stores the head as a second view of the table."""
    model = FAMILIES["llama_tied"]()
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    for source in ("safe", "bin"):
        loftq_cli.quantize(tmp_path / source, output=tmp_path / f"{source}-out", bits=2, rank=4, embeddings="quantize")
    one, other = ((tmp_path / f"{source}-out" / "model.safetensors").read_bytes() for source in ("safe", "bin"))
    assert one == other


def test_a_table_that_is_stored_twice_stays_as_it_is(tmp_path: Path) -> None:
    model = FAMILIES["llama_tied"]()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    plan = loftq_cli.plan(tmp_path, output=tmp_path / "out", bits=2, embeddings="quantize", lm_head="quantize")
    reasons = {unit.tensor: str(unit.reason) for unit in plan.kept}
    assert "tied" in reasons["lm_head.weight"] and "tied" in reasons["model.embed_tokens.weight"]


@pytest.mark.parametrize("embeddings", ["quantize", "adapt"])
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_embeddings_and_head(embeddings: str, form: str, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    family().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(
        tmp_path / "source", output=out, bits=2, rank=8, format=form, embeddings=embeddings, lm_head="quantize"
    )
    kinds = {record.kind: record for record in manifest.matrices}
    assert kinds["embedding"].rank == (8 if embeddings == "adapt" else 0) and kinds["head"].rank == 8
    loaded = load_plainly(out, family.auto_class).eval()
    twin = family()
    with torch.no_grad():
        for record in manifest.matrices:
            q = decode_matrix(out, manifest, record)
            if record.rank:
                q = q + decode_product(out, manifest, record)
            twin.get_submodule(record.module).weight.copy_(q)
    inputs = family.dummy_inputs(twin)
    assert torch.allclose(first_output(loaded, inputs), first_output(twin, inputs), atol=2e-4, rtol=2e-4)
    if embeddings == "adapt":
        assert kinds["embedding"].residual < kinds["embedding"].plain_residual


def test_a_table_with_a_forward_of_its_own_stays_as_it_is(tmp_path: Path) -> None:
    """Gemma scales its embeddings; a packed table could not."""
    import transformers

    family = FAMILIES["gemma3_text"]
    cls = getattr(transformers, family.model_class)
    cls(cls.config_class(**{**family.config, "tie_word_embeddings": False})).save_pretrained(tmp_path / "source")
    manifest = loftq_cli.quantize(tmp_path / "source", output=tmp_path / "out", bits=2, rank=4, embeddings="adapt")
    reasons = {record.tensor: record.reason for record in manifest.kept}
    assert "custom module" in reasons["model.embed_tokens.weight"]
