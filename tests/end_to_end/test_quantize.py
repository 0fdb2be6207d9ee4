"""The main job, end to end, on real trained checkpoints with the real loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.loading import check_matrices, load_plainly, source_weights

import loftq_cli
from loftq_cli.artifacts.decode import decode_product

FORMATS = [(bits, name) for bits in (2, 3, 4) for name in ("packed", "bnb", "dense") if (bits, name) != (3, "bnb")]


@pytest.mark.parametrize(("bits", "name"), FORMATS)
def test_small_llama(bits: int, name: str, small_llama: Path, wikitext: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "bnb":
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(small_llama, output=out, bits=bits, format=name, iters=5, rank=16)
    assert len(manifest.matrices) == 42 and manifest.format == name and manifest.dtype == "bfloat16"
    model = load_plainly(out, "AutoModelForCausalLM")
    check_matrices(out, manifest, model, source_weights(small_llama))

    tokens = AutoTokenizer.from_pretrained(out)(wikitext[:4000], return_tensors="pt").input_ids[:, :256]
    source = AutoModelForCausalLM.from_pretrained(small_llama).eval()
    model.eval()
    with torch.no_grad():
        reference = source(tokens).logits.float()
        with_adapter = model(tokens).logits.float()
        with model.disable_adapter():
            without = model(tokens).logits.float()
    assert (with_adapter - reference).norm() < (without - reference).norm()

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("bits", [2, 4])
def test_minilm(bits: int, minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    if bits == 4:
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(minilm, output=out, bits=bits, rank=64, iters=5)
    assert len(manifest.matrices) == 37
    model = load_plainly(out, "AutoModel").eval()
    check_matrices(out, manifest, model, source_weights(minilm))
    batch = AutoTokenizer.from_pretrained(out)(["a sentence", "and a longer one"], return_tensors="pt", padding=True)
    with torch.no_grad():
        reference = AutoModel.from_pretrained(minilm).eval()(**batch).last_hidden_state
        with_adapter = model(**batch).last_hidden_state
        with model.disable_adapter():
            without = model(**batch).last_hidden_state
    assert (with_adapter - reference).norm() < (without - reference).norm()


def test_the_resolved_recipe_repeats_the_run_byte_for_byte(small_llama: Path, tmp_path: Path) -> None:
    recipe = {"bits": 2, "rank": 8, "iters": 3, "rule": ("layers.0.=4:16", "down_proj=3"), "max_shard_size": "100KB"}
    loftq_cli.quantize(small_llama, output=tmp_path / "a", **recipe)
    loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "b")
    first = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.safetensors")}
    second = {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.safetensors")}
    assert len(first) > 3 and first == second
    assert (tmp_path / "a" / "loftq.yaml").read_bytes() == (tmp_path / "b" / "loftq.yaml").read_bytes()


def test_directory_holds_exactly_this(random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(random_llama, output=out, bits=2, max_shard_size="50KB")
    listing = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    shards = {name for name in listing if name.startswith("model-")}
    assert len(shards) > 1 and all(name.endswith(f"-of-{len(shards):05d}.safetensors") for name in shards)
    assert listing - shards == {
        "README.md",
        "config.json",
        "generation_config.json",
        "loftq.json",
        "loftq.yaml",
        "loftq_init/adapter_config.json",
        "loftq_init/adapter_model.safetensors",
        "model.safetensors.index.json",
    }
    assert set(manifest.files) == listing - {"loftq.json"}
    assert loftq_cli.read_manifest(out) == manifest


def test_manifest_hashes_are_the_files(random_llama: Path, tmp_path: Path) -> None:
    import hashlib

    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=2)
    for name, record in manifest.files.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (record.nbytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_backbone_and_adapter_carry_one_fingerprint(random_llama: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=2)
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "loftq_fingerprint": manifest.fingerprint}


def test_alpha_changes_the_files_and_not_the_start(small_llama: Path, tmp_path: Path) -> None:
    plain = loftq_cli.quantize(small_llama, output=tmp_path / "a", bits=2, rank=8, iters=1, include=("*.layers.0.*",))
    other = loftq_cli.quantize(
        small_llama, output=tmp_path / "b", bits=2, rank=8, iters=1, include=("*.layers.0.*",), alpha=32.0,
        rule=("q_proj=2:4",),
    )  # fmt: skip
    assert other.scaling == 4.0
    model = load_plainly(tmp_path / "b", "AutoModelForCausalLM")
    for one, two in zip(plain.matrices, other.matrices):
        layer = model.base_model.model.get_submodule(two.module)
        assert layer.scaling["default"] == 4.0
        delta = layer.get_delta_weight("default").float()
        assert torch.allclose(delta, decode_product(tmp_path / "b", other, two), atol=1e-6)
        if one.rank == two.rank:
            assert torch.allclose(delta, decode_product(tmp_path / "a", plain, one), atol=1e-6)


def test_qlora_is_plain_quantization(small_llama: Path, tmp_path: Path) -> None:
    qlora = loftq_cli.quantize(small_llama, output=tmp_path / "q", bits=2, method="qlora")
    zero = loftq_cli.quantize(small_llama, output=tmp_path / "t0", bits=2, iters=0)
    assert all(r.residual == r.plain_residual and r.best == 0 and r.residuals == () for r in qlora.matrices)
    for folder in ("q", "t0"):
        stored = load_file(tmp_path / folder / "loftq_init" / "adapter_model.safetensors")
        assert all(torch.count_nonzero(t) == 0 for n, t in stored.items() if "lora_B" in n)
        assert all(torch.count_nonzero(t) == t.numel() for n, t in stored.items() if "lora_A" in n)
    assert zero.totals.plain_residual == qlora.totals.plain_residual
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("q", "t0"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# Mean over the matrices of a checkpoint, by its folder: without an adapter, and after each of five steps.
MEASURED = {
    "tiny-llama": (0.5615, [0.4927, 0.4657, 0.4592, 0.4583, 0.4595]),
    "llama": (0.5606, [0.4393, 0.4133, 0.4119, 0.4161, 0.4224]),
}


def test_mean_residuals_are_the_measured_ones(small_llama: Path, tmp_path: Path) -> None:
    """Exact-SVD LoftQ on this checkpoint, measured independently beforehand: 2 bits, NF, block 64, rank 16."""
    plain, expected = MEASURED[small_llama.name]
    manifest = loftq_cli.quantize(small_llama, output=tmp_path / "out", bits=2, rank=16, dtype="float32")
    steps = torch.tensor([record.residuals for record in manifest.matrices]).mean(0)
    assert manifest.totals.plain_residual == pytest.approx(plain, abs=2e-4)
    assert steps.tolist() == pytest.approx(expected, abs=7e-4)


def test_nonfinite_weights_are_named(random_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from loftq_cli.errors import LoftqError

    source = tmp_path / "source"
    source.mkdir()
    for path in random_llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(LoftqError, match=rf"{name} .*holds nan at \[3, 5\]"):
        loftq_cli.quantize(source, output=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".loftq"]
