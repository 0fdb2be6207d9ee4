"""`loftq merge`: the result computes what backbone and adapter compute, and the reported errors are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import loftq, sentence
from support.trained_llama import CHECKPOINT
from torch import Tensor

import loftq_cli
from loftq_cli.errors import UsageError
from loftq_cli.numerics.methods.qalora import lost_in_integer_zeros

IDS = torch.arange(24).reshape(2, 12)


def train(converted: Path, saved: Path, *, rate: float = 0.02, ids: Tensor = IDS) -> Tensor:
    """Train a few steps with PEFT, save with PEFT, and return the logits of the trained model."""
    model = loftq_cli.load(converted, trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(saved)
    return logits(model, ids)


def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits
    return found if found.dtype == torch.float64 else found.float()


def plain_logits(path: Path) -> Tensor:
    """Return the logits of a directory loaded with transformers alone."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return logits(model)


@pytest.fixture(scope="module")
def qalora(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """Backbone of 2-bit integers with float zeros, trained adapter, logits."""
    folder = tmp_path_factory.mktemp("qalora")
    recipe = {"bits": 2, "method": "qa-lora", "group_size": 32, "rank": 2, "alpha": 4.0, "iters": 1, "scale": "minmax"}
    loftq_cli.quantize(random_llama, output=folder / "out", **recipe)
    return folder / "out", folder / "trained", train(folder / "out", folder / "trained")


@pytest.fixture(scope="module")
def loftq_model(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """Mixed widths and ranks, a dense matrix with an adapter, another alpha than the rank."""
    folder = tmp_path_factory.mktemp("loftq")
    rules = ("v_proj=dense", "q_proj=4:2", "layers.0.*up_proj=skip")
    loftq_cli.quantize(random_llama, output=folder / "out", bits=2, rank=4, alpha=8.0, iters=1, rule=rules)
    return folder / "out", folder / "trained", train(folder / "out", folder / "trained")


def test_qalora_merges_into_zeros_exactly(qalora: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    backbone, adapter, expected = qalora
    report = loftq_cli.merge(backbone, adapter, output=tmp_path / "merged")
    assert report.way == "zeros" and report.worst_error < 1e-6 and len(report.errors) == 14
    found = plain_logits(tmp_path / "merged")
    assert (found - expected).abs().max() < 1e-5
    assert (found - logits(loftq_cli.load(backbone, adapter=False))).abs().max() > 1e-3, "training changed something"
    before, after = load_file(backbone / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight_zeros") for name in changed), "same codes, same scales, same bits"
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (backbone / "config.json").read_text()
    )
    assert not (tmp_path / "merged" / "loftq_init").exists() and not (tmp_path / "merged" / ".loftq").exists()
    manifest = loftq_cli.read_manifest(tmp_path / "merged")
    assert manifest.totals.adapter_bytes == 0 and {record.bits for record in manifest.matrices} == {2}
    weight = loftq_cli.load(tmp_path / "merged", adapter=False).model.layers[0].mlp.up_proj.dequantized_weight()
    assert torch.equal(loftq_cli.decode(tmp_path / "merged", "model.layers.0.mlp.up_proj"), weight)


def test_merging_a_trained_llama_costs_less_than_float32_itself(
    small_llama: Path, wikitext: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of about 20 after six layers: float32 sums alone leave 1e-5. In float64 the merge shows by itself."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(small_llama)(wikitext[:1000], return_tensors="pt").input_ids[:, :128]
    recipe = {"bits": 2, "method": "qa-lora", "group_size": 32, "rank": 8, "iters": 1, "scale": "minmax"}
    loftq_cli.quantize(small_llama, output=tmp_path / "out", dtype="float32", **recipe)
    start = logits(loftq_cli.load(tmp_path / "out"), ids)
    trained = train(tmp_path / "out", tmp_path / "trained", rate=1e-3, ids=ids)
    assert loftq_cli.merge(tmp_path / "out", tmp_path / "trained", output=tmp_path / "merged").way == "zeros"
    merged = loftq_cli.load(tmp_path / "merged", adapter=False)
    found = logits(merged, ids)
    keep_float64(monkeypatch)
    exact = logits(loftq_cli.load(tmp_path / "out", adapter=tmp_path / "trained").double(), ids)
    of_merge = logits(merged.double(), ids) - exact
    assert exact.dtype == torch.float64 and exact.abs().max() > 10 and (exact - start).abs().max() > 0.1
    assert of_merge.abs().max() < 5e-6
    # In float32 the merged model is as near to the exact logits as backbone and adapter are,
    noise, noise_merged = (trained - exact).norm(), (found - exact - of_merge).norm()
    assert of_merge.norm() < noise / 3 and (found - exact).norm() < 1.5 * noise
    # and the two are no further apart than two independent runs with float32's own errors are.
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-5)
    assert (found - trained).norm() < torch.hypot(noise, noise_merged)


@pytest.mark.parametrize("kind", ["qalora", "loftq_model"])
def test_dense(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    backbone, adapter, expected = request.getfixturevalue(kind)
    report = loftq_cli.merge(backbone, adapter, output=tmp_path / "merged", to="dense", max_shard_size="40KB")
    assert report.way == "dense" and report.worst_error == 0.0, "a float32 model loses nothing"
    assert (plain_logits(tmp_path / "merged") - expected).abs().max() < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    if kind == "loftq_model":
        assert loftq_cli.merge(backbone, adapter, output=tmp_path / "auto").way == "dense"


def keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Llama's norm compute in the dtype of its input; its own code goes through float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def wide(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", wide)


def test_a_bfloat16_model_merges_exactly_too(
    small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"bits": 4, "method": "qa-lora", "group_size": 32, "rank": 4, "iters": 1, "include": ("*.layers.0.*",)}
    manifest = loftq_cli.quantize(small_llama, output=tmp_path / "out", **recipe)
    assert manifest.dtype == "bfloat16"
    report = loftq_cli.merge(tmp_path / "out", tmp_path / "out" / "loftq_init", output=tmp_path / "merged")
    assert report.way == "zeros" and 0 < report.worst_error < 1e-6
    both = loftq_cli.load(tmp_path / "out", dtype=torch.float32)
    merged = loftq_cli.load(tmp_path / "merged", adapter=False, dtype=torch.float32)
    if small_llama != CHECKPOINT:  # there float32's own errors reach 1.4e-5
        assert (logits(both) - logits(merged)).abs().max() < 1e-5
    keep_float64(monkeypatch)
    assert (logits(both.double()) - logits(merged.double())).abs().max() < 5e-6
    layer = loftq_cli.load(tmp_path / "merged", adapter=False).model.layers[0].mlp.up_proj
    assert torch.equal(loftq_cli.decode(tmp_path / "merged", "model.layers.0.mlp.up_proj"), layer.dequantized_weight())


def test_requantize_reports_its_error(loftq_model: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    backbone, adapter, _ = loftq_model
    report = loftq_cli.merge(backbone, adapter, output=tmp_path / "merged", to="requantize")
    loftq_cli.merge(backbone, adapter, output=tmp_path / "dense", to="dense")
    exact = load_file(tmp_path / "dense" / "model.safetensors")
    manifest = loftq_cli.read_manifest(tmp_path / "merged")
    for record in manifest.matrices:
        w = exact[record.tensor]
        left = float((w - loftq_cli.decode(tmp_path / "merged", record.module)).norm() / w.norm())
        assert left == pytest.approx(report.errors[record.module], rel=1e-4) and left == pytest.approx(
            record.residual, rel=1e-5
        )
    widths = {record.module: record.bits for record in loftq_cli.read_manifest(backbone).matrices}
    assert {record.module: record.bits for record in manifest.matrices} == widths
    assert 0.1 < report.mean_error < 1 and torch.isfinite(plain_logits(tmp_path / "merged")).all()
    v_proj = "model.layers.0.self_attn.v_proj.weight"
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[v_proj], exact[v_proj]), "what was dense stays dense"


def test_bnb_backbone(random_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=4, rank=4, iters=1)
    expected = train(tmp_path / "out", tmp_path / "trained")
    assert loftq_cli.merge(tmp_path / "out", tmp_path / "trained", output=tmp_path / "merged").format == "dense"
    assert (plain_logits(tmp_path / "merged") - expected).abs().max() < 1e-4


def test_embedding_and_head_of_a_llama(random_llama: Path, tmp_path: Path) -> None:
    recipe = {"bits": 4, "rank": 2, "iters": 1, "embeddings": "adapt", "lm_head": "quantize", "format": "packed"}
    loftq_cli.quantize(random_llama, output=tmp_path / "out", **recipe)
    expected = train(tmp_path / "out", tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert any(".base_layer." in name for name in saved), "PEFT saves the table too, which merging ignores"
    loftq_cli.merge(tmp_path / "out", tmp_path / "trained", output=tmp_path / "merged")
    assert (plain_logits(tmp_path / "merged") - expected).abs().max() < 1e-5


def test_conv1d_and_embedding(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    recipe = {"bits": 4, "rank": 2, "iters": 1, "embeddings": "adapt", "rule": ("c_fc=dense",), "format": "packed"}
    loftq_cli.quantize(tmp_path / "gpt2", output=tmp_path / "out", **recipe)
    expected = train(tmp_path / "out", tmp_path / "trained")
    report = loftq_cli.merge(tmp_path / "out", tmp_path / "trained", output=tmp_path / "merged")
    assert "transformer.wte" in report.errors and "transformer.h.0.mlp.c_fc" in report.errors
    assert (plain_logits(tmp_path / "merged") - expected).abs().max() < 1e-5


def test_bfloat16_is_rounded_once_and_float32_is_not(small_llama: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(small_llama, output=tmp_path / "out", bits=2, rank=2, iters=1, include=("*.layers.0.*",))
    adapter = tmp_path / "out" / "loftq_init"
    rounded = loftq_cli.merge(tmp_path / "out", adapter, output=tmp_path / "bf16")
    assert rounded.dtype == "bfloat16" and 1e-4 < rounded.worst_error < 2**-8
    exact = loftq_cli.merge(tmp_path / "out", adapter, output=tmp_path / "fp32", dtype="float32")
    assert exact.worst_error == 0.0
    assert {t.dtype for t in load_file(tmp_path / "fp32" / "model.safetensors").values()} == {torch.float32}


def test_integer_zeros_would_lose_the_update() -> None:
    codes = torch.randint(0, 4, (16, 128), generator=torch.Generator().manual_seed(0)).float()
    quantized = (codes - 1) * 0.1
    small = torch.full((16, 4), 0.004)
    assert lost_in_integer_zeros(small, quantized) == 1.0
    assert lost_in_integer_zeros(torch.full((16, 4), 0.2), quantized) < 1e-5, "two whole steps"


def test_an_interrupted_merge_does_not_look_like_a_model(
    qalora: tuple[Path, Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.merging import merge as engine

    backbone, adapter, expected = qalora
    whole = engine.merge_piece
    count = 0

    def stop(*arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(engine, "merge_piece", stop)
    with pytest.raises(KeyboardInterrupt):
        loftq_cli.merge(backbone, adapter, output=tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == [".loftq"]
    loftq_cli.merge(backbone, adapter, output=tmp_path / "merged")
    assert (plain_logits(tmp_path / "merged") - expected).abs().max() < 1e-5


def edited(adapter: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_what_cannot_be_merged_is_refused(
    qalora: tuple[Path, Path, Tensor], loftq_model: tuple[Path, Path, Tensor], random_llama: Path, tmp_path: Path
) -> None:
    backbone, adapter, _ = qalora
    other, lora, _ = loftq_model

    def refused(said: str, *words: object, code: int = 2) -> None:
        out = tmp_path / "never"
        assert said in sentence(loftq("merge", *words, "-o", out, code=code))
        assert not (out / "config.json").exists()

    refused("not constant within groups", other, lora, "--to", "zeros")
    refused("--to cannot be 'awq'", other, lora, "--to", "awq")
    refused("holds no adapter_config.json", other, random_llama, code=1)
    refused("holds no loftq.json", random_llama, lora, code=1)
    refused("is of PEFT's type IA3", other, edited(lora, tmp_path / "ia3", peft_type="IA3"), code=1)
    refused("DoRA", other, edited(lora, tmp_path / "dora", use_dora=True), code=1)
    refused("trained as a whole", other, edited(lora, tmp_path / "whole", modules_to_save=["lm_head"]), code=1)
    tensors = load_file(lora / "adapter_model.safetensors")
    renamed = edited(lora, tmp_path / "renamed")
    save_file({n.replace("layers.1", "layers.9"): t for n, t in tensors.items()}, renamed / "adapter_model.safetensors")
    refused("not a matrix of", other, renamed, code=1)
    cut = edited(lora, tmp_path / "cut")
    save_file(
        {n: t[:, 1:].clone() if "lora_A" in n else t for n, t in tensors.items()}, cut / "adapter_model.safetensors"
    )
    refused("give the adapter of this model", other, cut, code=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in sentence(loftq("merge", backbone, adapter, "-o", tmp_path / "full", code=2))
    assert "overlap: choose another -o" in sentence(loftq("merge", backbone, adapter, "-o", backbone / "x", code=2))
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_the_command(qalora: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    backbone, adapter, _ = qalora
    shown = loftq("merge", backbone, adapter, "-o", tmp_path / "out").stdout
    assert "14 matrices merged" in shown and "same bits" in shown and "written to" in shown
    assert "give --overwrite" in sentence(loftq("merge", backbone, adapter, "-o", tmp_path / "out", code=2))
    values = json.loads(loftq("merge", backbone, adapter, "-o", tmp_path / "out", "--overwrite", "--json").stdout)
    assert values["way"] == "zeros" and values["worst_error"] < 1e-6
    assert json.loads((tmp_path / "out" / "loftq_merge.json").read_text())["fingerprint"] == values["fingerprint"]
    assert loftq("inspect", tmp_path / "out").stdout.count("q_proj") == 2


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_integer_zero_points_are_refused_with_the_measured_loss(name: str, random_llama: Path, tmp_path: Path) -> None:
    recipe = {"bits": 4, "method": "qa-lora", "group_size": 32, "rank": 2, "iters": 1, "format": name}
    made = loftq_cli.quantize(random_llama, output=tmp_path / "out", **recipe)
    assert made.matrices and {record.affine.zero for record in made.matrices if record.affine} == {"integer"}
    adapter = tmp_path / "out" / "loftq_init"
    for to in ("auto", "zeros"):
        said = sentence(loftq("merge", tmp_path / "out", adapter, "--to", to, "-o", tmp_path / "merged", code=2))
        assert f"zero points of {name} are whole numbers, so 100% of this adapter's update" in said
    report = loftq_cli.merge(tmp_path / "out", adapter, output=tmp_path / "merged", to="dense")
    assert report.way == "dense" and len(report.errors) == len(made.matrices)


def test_qalora_merges_into_gguf(random_llama: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf, which reads GGUF files, is not installed")
    from transformers import AutoModelForCausalLM

    recipe = {"bits": 4, "method": "qa-lora", "group_size": 32, "rank": 2, "iters": 1}
    loftq_cli.quantize(random_llama, output=tmp_path / "out", **recipe)
    expected = train(tmp_path / "out", tmp_path / "trained")
    report = loftq_cli.merge(tmp_path / "out", tmp_path / "trained", output=tmp_path / "merged", to="gguf")
    assert report.way == report.format == "gguf" and report.worst_error < 1e-3, "float16 scales and zeros"
    reader = gguf.GGUFReader(tmp_path / "merged" / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if "attn_q" in tensor.name or "ffn" in tensor.name}
    assert kinds <= {"Q4_1", "F32"} and "Q4_1" in kinds
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", gguf_file="model.gguf", dtype=torch.float32)
    found, start = logits(model), logits(loftq_cli.load(tmp_path / "out", adapter=False))
    assert (found - expected).norm() < 0.05 * (start - expected).norm(), "the update is there, but for its rounding"
    exact = loftq_cli.merge(tmp_path / "out", tmp_path / "trained", output=tmp_path / "zeros")
    assert exact.worst_error < 1e-6 < report.worst_error
    with pytest.raises(UsageError, match="4-bit integers in groups of 32"):
        two = {**recipe, "bits": 2}
        loftq_cli.quantize(random_llama, output=tmp_path / "two", **two)
        loftq_cli.merge(tmp_path / "two", tmp_path / "two" / "loftq_init", output=tmp_path / "never", to="gguf")


@pytest.mark.parametrize("to", ["zeros", "requantize"])
def test_what_stays_quantized_verifies(to: str, qalora: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    backbone, adapter, _ = qalora
    loftq_cli.merge(backbone, adapter, output=tmp_path / "merged", to=to)
    assert not loftq_cli.verify(tmp_path / "merged").problems
