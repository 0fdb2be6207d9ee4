"""`--calibrate`: second moments of real inputs, collected block by block, and what they do to a conversion."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import typer.testing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.calibration_text import TEXT, llama
from support.family_checkpoints import saved
from support.interruptions import tensors
from support.perplexity import write_tokenizer

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.calibration.collector import MomentCollector, write_moments
from loftq_cli.calibration.moments import open_moments
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.forward.opening import open_model
from loftq_cli.forward.weights import SourceWeights
from loftq_cli.numerics.methods.weighted import whiten
from loftq_cli.progress import Reporter

runner = typer.testing.CliRunner()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize(("name", "pieces"), [("llama", 2), ("gpt2", 3), ("bert", 2), ("bart", 2), ("bloom", 2)])
def test_moments_are_those_of_the_model_s_own_forward(name: str, pieces: int, kind: str, tmp_path: Path) -> None:
    """In pieces, in two groups and block by block, against hooks on transformers' model run at once."""
    reference = saved(name).model
    modules = [path for path, m in reference.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    modules = [path for path in modules if "head" not in path]
    ids = torch.randint(1, 90, (7, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if reference.config.is_encoder_decoder else {})
    expected: dict[str, torch.Tensor] = {}

    def remember(path: str, inputs: torch.Tensor) -> None:
        x = inputs.detach().flatten(0, -2).double()
        expected[path] = x.T @ x / len(x)

    hooks = [
        reference.get_submodule(path).register_forward_pre_hook(lambda _m, args, path=path: remember(path, args[0]))
        for path in modules
    ]
    with torch.no_grad():
        reference(**batch)
    for hook in hooks:
        hook.remove()
    checkpoint = open_checkpoint(saved(name).folder)
    model = open_model(checkpoint, torch.device("cpu"))
    model.piece = pieces
    model.load(SourceWeights(checkpoint))
    collector = MomentCollector(model, modules, kind, tmp_path)
    for rows in (slice(0, 4), slice(4, 7)):
        model.run({key: value[rows] for key, value in batch.items()}, head=False)
    write_moments(tmp_path / "moments.safetensors", collector, {"kind": kind})
    moments = open_moments(tmp_path / "moments.safetensors")
    for path, second in expected.items():
        found = moments.of(path, kind)
        assert found is not None, path
        wanted = second if kind == "full" else second.diagonal()
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.of(path, "diagonal"), second.diagonal().float(), rtol=1e-4, atol=1e-6)
    if name == "llama":
        attention = {moments.shared[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"}
        assert len(attention) == 1 and moments.shared["model.layers.0.self_attn.o_proj"] not in attention
        assert len(load_file(moments.file)) == 2 * 4


def check_records(manifest: Manifest, path: Path, source: Path, kind: str, moments: Path) -> None:
    """The weighted residuals in the manifest are those of the files."""
    weights = load_file(source / "model.safetensors")
    opened = open_moments(moments)
    for record in manifest.matrices:
        moment = opened.of(record.module, kind)
        assert moment is not None
        whitening, w = whiten(moment), weights[record.tensor].float()
        left = w - decode_matrix(path, manifest, record) - decode_product(path, manifest, record)
        weighted = float(whitening.apply(left).norm() / whitening.apply(w).norm())
        assert record.weighted_residual == pytest.approx(weighted, rel=1e-4)
        assert record.residual == pytest.approx(float(left.norm() / w.norm()), rel=1e-4)
        assert record.weighted_plain_residual is not None and weighted < record.weighted_plain_residual


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_calibrated_conversion(kind: str, text: Path, tmp_path: Path, own_cache: Path) -> None:
    source = llama(tmp_path / "llama")
    options = {"bits": 2, "rank": 8, "iters": 1, "calibration_tokens": 250}  # one step: the same Q, another BA
    first = loftq_cli.quantize(source, output=tmp_path / "a", calibrate=text, calibrate_kind=kind, **options)
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    check_records(first, tmp_path / "a", source, kind, kept)
    plain = loftq_cli.quantize(source, output=tmp_path / "plain", **options)
    moments = open_moments(kept)
    for record, other in zip(first.matrices, plain.matrices):
        moment, w = moments.of(record.module, kind), load_file(source / "model.safetensors")[record.tensor]
        assert moment is not None
        left = w - decode_matrix(tmp_path / "plain", plain, other) - decode_product(tmp_path / "plain", plain, other)
        unweighted = float(whiten(moment).apply(left).norm() / whiten(moment).apply(w).norm())
        assert record.weighted_residual is not None and record.weighted_residual < unweighted, record.module
    assert first.fingerprint != plain.fingerprint
    assert plain.matrices[0].weighted_residual is None
    # the recipe repeats it byte for byte, from the cache, wherever the same text lies
    changed = kept.stat().st_mtime_ns
    again = loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "b")
    assert kept.stat().st_mtime_ns == changed
    moved = tmp_path / "moved.txt"
    text.rename(moved)
    third = loftq_cli.quantize(source, output=tmp_path / "c", calibrate=moved, calibrate_kind=kind, **options)
    assert kept.stat().st_mtime_ns == changed
    # or from the file itself
    loftq_cli.quantize(source, output=tmp_path / "d", calibrate=kept, calibrate_kind=kind, **options)
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert first.files[name] == again.files[name] == third.files[name]
        a, d = load_file(tmp_path / "a" / name), load_file(tmp_path / "d" / name)
        assert all(torch.equal(a[key], d[key]) for key in a)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "calibrated on" in card and str(first.recipe["calibration_hash"]) in card and "weighted residual" in card
    assert f"--calibrate {text}" in card and "calibration-hash" not in card


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_calibration_weighs_the_refined_method_too(kind: str, text: Path, tmp_path: Path, own_cache: Path) -> None:
    source = llama(tmp_path / "llama")
    options = {"bits": 2, "rank": 8, "method": "refined", "calibration_tokens": 250}
    found = loftq_cli.quantize(source, output=tmp_path / "a", calibrate=text, calibrate_kind=kind, **options)
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    check_records(found, tmp_path / "a", source, kind, kept)
    plain = loftq_cli.quantize(source, output=tmp_path / "plain", **options)
    moments, weighted, unweighted = open_moments(kept), 0.0, 0.0
    weights = load_file(source / "model.safetensors")
    for record, other in zip(found.matrices, plain.matrices):
        moment, w = moments.of(record.module, kind), weights[record.tensor]
        assert moment is not None and record.weighted_residual is not None
        left = w - decode_matrix(tmp_path / "plain", plain, other) - decode_product(tmp_path / "plain", plain, other)
        weighted += record.weighted_residual
        unweighted += float(whiten(moment).apply(left).norm() / whiten(moment).apply(w).norm())
    assert weighted < unweighted


@pytest.mark.parametrize("method", ["loftq", "refined"])
def test_integer_groups_are_calibrated_too(method: str, text: Path, tmp_path: Path, own_cache: Path) -> None:
    source = llama(tmp_path / "llama")
    options = {"bits": 2, "rank": 8, "iters": 2, "data_type": "int", "group_size": 32, "method": method}
    found = loftq_cli.quantize(source, output=tmp_path / "a", calibrate=text, calibration_tokens=250, **options)
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    check_records(found, tmp_path / "a", source, "diagonal", kept)
    assert loftq_cli.verify(tmp_path / "a", source=source).ok


def test_two_workers_give_the_bytes_of_one(text: Path, tmp_path: Path, own_cache: Path) -> None:
    """They find the second moments that the main process has collected, and `verify` the unweighted residuals."""
    source = llama(tmp_path / "llama")
    options = {"bits": 2, "rank": 8, "iters": 2, "calibrate": text, "calibration_tokens": 250}
    loftq_cli.quantize(source, output=tmp_path / "one", **options)
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    kept.unlink()
    loftq_cli.quantize(source, output=tmp_path / "two", num_processes=2, **options)
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two")
    found = loftq_cli.verify(tmp_path / "two", source=source)
    assert found.ok and found.matrices and found.largest_deviation < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_fitted_without_weights_and_it_is_said(name: str, text: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    shutil.copytree(saved(name).folder, source)
    write_tokenizer(source)
    options = {"bits": 2, "rank": 4, "iters": 1, "format": "packed"}
    plain = loftq_cli.quantize(source, output=tmp_path / "plain", **options)
    options |= {"calibrate": text, "calibration_tokens": 250}
    assert any("of experts are fitted without weights" in note for note in loftq_cli.plan(source, **options).notes)
    found = loftq_cli.quantize(source, output=tmp_path / "out", **options)
    for record, other in zip(found.matrices, plain.matrices):
        assert (record.weighted_residual is None) == (record.expert is not None), record.module
        assert record.expert is None or record.residual == other.residual
    assert loftq_cli.verify(tmp_path / "out", source=source).ok


def test_a_model_that_overflows_cannot_be_calibrated_on(text: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoftqError, match=r"gives NaN or infinity before .*: repair the checkpoint"):
        loftq_cli.quantize(source, output=tmp_path / "a", calibrate=text, calibration_tokens=200, allow_nonfinite=True)


def test_the_model_that_was_run_is_gone_when_matrices_are_converted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds itself, and a large one's embeddings would take gigabytes all the while."""
    seen, alive = [], []

    def watched(checkpoint, device):
        opened = open_model(checkpoint, device)
        seen.append(weakref.ref(opened.model))
        return opened

    class Watch(Reporter):
        def start(self, plan, finished) -> None:
            alive.extend(ref() is not None for ref in seen)

    monkeypatch.setattr("loftq_cli.forward.opening.open_model", watched)
    options = {"bits": 2, "rank": 4, "iters": 1, "calibrate": str(text)}
    gc.disable()  # or it may be gone by luck
    try:
        loftq_cli.quantize(llama(tmp_path / "model"), output=tmp_path / "out", reporter=Watch(), **options)
    finally:
        gc.enable()
    assert alive == [False]


def test_another_text_is_another_conversion(text: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    options = {"bits": 2, "rank": 8, "iters": 1, "calibrate": text, "calibration_tokens": 200}
    loftq_cli.quantize(source, output=tmp_path / "a", **options)
    text.write_text("w1 " + TEXT)
    with pytest.raises(LoftqError, match="not what this recipe was calibrated on"):
        loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "b")
    with pytest.raises(UsageError, match="calibration-hash"):
        loftq_cli.quantize(source, output=tmp_path / "a", **options)


def test_the_output_head_has_moments_of_its_own(text: Path, tmp_path: Path, own_cache: Path) -> None:
    source = llama(tmp_path / "llama")
    found = loftq_cli.quantize(
        source,
        output=tmp_path / "a",
        bits=2,
        rank=4,
        iters=1,
        lm_head="quantize",
        calibrate=text,
        calibration_tokens=200,
    )
    assert found.matrix("lm_head").weighted_residual is not None


def test_a_model_that_cannot_run_block_by_block_says_so_once(text: Path, tmp_path: Path) -> None:
    saved("bloom").model.save_pretrained(tmp_path / "bloom")
    write_tokenizer(tmp_path / "bloom")
    words = ["quantize", tmp_path / "bloom", "-o", tmp_path / "out", "--calibrate", text, "--calibration-tokens", 100]
    shown = runner.invoke(app, [str(word) for word in words])
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.count("cannot be run block by block") == 1


def test_flags_reach_the_recipe(text: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    flags = ["--calibrate", text, "--calibrate-kind", "full", "--calibration-tokens", 150, "--iters", 1]
    shown = runner.invoke(app, [str(word) for word in ("quantize", source, "-o", tmp_path / "out", *flags, "--json")])
    assert shown.exit_code == 0, shown.stderr
    recipe = json.loads(shown.stdout)["recipe"]
    assert (recipe["calibrate"], recipe["calibrate_kind"], recipe["calibration_tokens"]) == (str(text), "full", 150)
    planned = loftq_cli.plan(source, calibrate=text, calibrate_kind="full", calibration_tokens=150, iters=1)
    assert planned.recipe.calibration_hash == recipe["calibration_hash"] and planned.moments is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"calibrate": "nowhere.txt"}, "--calibrate nowhere.txt: there is no such file"),
        ({"calibrate": "nowhere.safetensors"}, "there is no such file"),
        ({"calibrate_kind": "some"}, "--calibrate-kind cannot be 'some'"),
        ({"calibration_tokens": 0}, "--calibration-tokens cannot be 0"),
        ({"method": "qlora"}, "--calibrate weights the fit of the adapter"),
        ({"method": "qa-lora"}, "--calibrate does not support qa-lora"),
        ({"iters": 0}, "--calibrate weights the fit of the adapter"),
    ],
)
def test_what_cannot_be_meant(change: dict, said: str, text: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    with pytest.raises(UsageError, match=said):
        loftq_cli.quantize(source, output=tmp_path / "out", **{"calibrate": text, **change})


def test_moments_of_another_model_are_refused(text: Path, tmp_path: Path, random_llama: Path, own_cache: Path) -> None:
    source = llama(tmp_path / "llama")
    loftq_cli.quantize(source, output=tmp_path / "a", iters=1, calibrate=text, calibration_tokens=200)
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    with safe_open(kept, "pt") as opened:
        assert opened.metadata()["kind"] == "diagonal" and int(opened.metadata()["tokens"]) <= 200 + 8
    with pytest.raises(LoftqError, match=r"is of another model: .*_proj takes 160 inputs"):
        loftq_cli.quantize(random_llama, output=tmp_path / "b", calibrate=kept)
    with pytest.raises(UsageError, match="holds only diagonals"):
        loftq_cli.quantize(source, output=tmp_path / "c", calibrate=kept, calibrate_kind="full")
    with pytest.raises(LoftqError, match="holds no second moments"):
        loftq_cli.quantize(source, output=tmp_path / "d", calibrate=source / "model.safetensors")


def test_the_shipped_text_needs_nothing(tmp_path: Path, own_cache: Path) -> None:
    """In the manifest, the recipe and the card under its name, hashed; repeated, resumed and refused like any text."""
    import hashlib
    from importlib.resources import files

    shipped = files("loftq_cli.calibration").joinpath("default", "text.txt").read_bytes()
    digest, about = hashlib.sha256(shipped).hexdigest(), files("loftq_cli.calibration").joinpath("default", "README.md")
    assert digest in about.read_text(encoding="utf-8") and len(shipped) < 200_000
    source = llama(tmp_path / "llama")
    (tmp_path / "copy.txt").write_bytes(shipped)
    options = {"bits": 2, "rank": 4, "iters": 1, "calibration_tokens": 250, "method": "refined"}
    plain = loftq_cli.quantize(source, output=tmp_path / "plain", **options)
    first = loftq_cli.quantize(source, output=tmp_path / "a", calibrate="default", **options)
    assert first.recipe["calibrate"] == "default" and first.recipe["calibration_hash"] == digest
    assert first.fingerprint != plain.fingerprint and first.matrices[0].weighted_residual is not None
    assert "the text that ships with loftq, sha256 " + digest in (tmp_path / "a" / "README.md").read_text()
    (kept,) = (own_cache / "loftq" / "moments").glob("*.safetensors")
    assert open_moments(kept).about["text_sha256"] == digest
    again = loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "b")
    copied = loftq_cli.quantize(source, output=tmp_path / "c", calibrate=tmp_path / "copy.txt", **options)
    assert again.fingerprint == copied.fingerprint == first.fingerprint
    assert again.files["model.safetensors"] == copied.files["model.safetensors"] == first.files["model.safetensors"]
    with pytest.raises(LoftqError, match="is not what this recipe was calibrated on"):
        loftq_cli.quantize(source, output=tmp_path / "d", calibrate="default", calibration_hash="0" * 64, **options)


def test_the_shipped_text_holds_every_domain_from_the_start() -> None:
    """Within the default 16384 tokens, about four bytes each."""
    from importlib.resources import files

    start = files("loftq_cli.calibration").joinpath("default", "text.txt").read_text(encoding="utf-8")[:40_000]
    for part in (" Alice ", "def ", "```bash", "#### ", "Assistant: ", "| item | count |", '"city": ', " INFO worker-"):
        assert start.count(part) > 1, part
    assert start.isprintable() or set(start) - {"\n"} == {c for c in start if c.isprintable()}
