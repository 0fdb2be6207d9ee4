"""Odd but valid: what no damage is has to work, and the recorded residual has to be the files' residual."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.errors import LoftqError

NAME = "model.layers.1.mlp.up_proj.weight"


def changed(source: Path, target: Path, **tensors: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor) -> Path:
    """A copy with one matrix changed (`matrix=`), or with more tensors."""
    shutil.copytree(source, target)
    found = load_file(target / "model.safetensors")
    change = tensors.pop("matrix", None)
    if callable(change):
        found[NAME] = change(found[NAME]).contiguous()
    save_file({**found, **tensors}, target / "model.safetensors")
    return target


def outlier(weight: torch.Tensor) -> torch.Tensor:
    weight[7, 3] = 1e6
    return weight


MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, 0.37),
    "one huge outlier": outlier,
    "1e-30": lambda w: w * 1e-30,
    "1e30": lambda w: w * 1e30,
    "both": lambda w: torch.cat([w[:9] * 1e30, w[9:] * 1e-30]),
    "subnormal": lambda w: w * 1e-39,
    "one row": lambda w: torch.zeros_like(w).index_copy(0, torch.tensor([4]), w[4:5]),
}


@pytest.mark.parametrize(("bits", "name"), [(2, "packed"), (4, "bnb"), (3, "dense")])
@pytest.mark.parametrize("what", MATRICES)
def test_odd_matrices(what: str, bits: int, name: str, random_llama: Path, tmp_path: Path) -> None:
    if name == "bnb":
        pytest.importorskip("bitsandbytes")
    source, out = changed(random_llama, tmp_path / "source", matrix=MATRICES[what]), tmp_path / "out"
    manifest = loftq_cli.quantize(
        source, output=out, bits=bits, rank=8, iters=3, format=name, include=("*.1.mlp.up_*",)
    )
    record = manifest.matrix(NAME)
    weight = load_file(source / "model.safetensors")[NAME].double()
    left = weight - decode_matrix(out, manifest, record).double() - decode_product(out, manifest, record).double()
    assert bool(left.isfinite().all()) and record.residual <= record.plain_residual
    if what == "zero":
        assert record.residual == 0 and not left.any()
    else:
        assert float(left.norm() / weight.norm()) == pytest.approx(record.residual, rel=1e-3, abs=1e-6)


def test_numbers_float32_cannot_calculate_with(random_llama: Path, tmp_path: Path) -> None:
    source = changed(random_llama, tmp_path / "source", matrix=lambda w: w / w.abs().max() * 3.3e38)
    with pytest.raises(LoftqError, match=r"up_proj.weight .* holds numbers up to 3\.3e\+38"):
        loftq_cli.quantize(source, output=tmp_path / "out", bits=2, iters=1)


def test_rank_above_the_matrix(random_llama: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.quantize(random_llama, output=tmp_path / "out", bits=2, rank=100_000, iters=2, format="dense")
    assert {record.rank for record in manifest.matrices} == {min(record.shape) for record in manifest.matrices}
    assert all(record.residual < 1e-5 for record in manifest.matrices), "at full rank nothing is left"


def test_extra_tensors_travel(random_llama: Path, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "notes.weight": torch.arange(12).reshape(3, 4),
    }
    source = changed(random_llama, tmp_path / "source", **extra)
    manifest = loftq_cli.quantize(source, output=tmp_path / "out", bits=2, iters=1)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    assert any("notes.weight" in note for note in manifest.notes)


def test_spaces_and_other_scripts_in_paths(random_llama: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "mein Módell 模型 [1]" / "a b%20c", tmp_path / "sortie é {0}" / "o'ut"
    shutil.copytree(random_llama, source)
    (source / "model.safetensors").rename(source / "gewichte für [alle].safetensors")
    manifest = loftq_cli.quantize(source, output=out, bits=2, iters=1)
    assert loftq_cli.load(out, trainable=True) is not None and manifest.output == str(out)
    loftq_cli.quantize(config=out / "loftq.yaml", output=tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_source_nobody_may_write(random_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(random_llama, source)
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    try:
        loftq_cli.quantize(source, output=tmp_path / "out", bits=2, iters=1)
        assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
        copied = tmp_path / "out" / "generation_config.json"
        assert copied.stat().st_mode & 0o200, "what is ours may be changed"
    finally:
        source.chmod(0o755)


def test_nonfinite_matrices_stay_dense_when_allowed(random_llama: Path, tmp_path: Path) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = float("-inf")
        weight[9, 1] = float("nan")
        return weight

    source, out = changed(random_llama, tmp_path / "source", matrix=spoil), tmp_path / "out"
    with pytest.raises(LoftqError, match=rf"{NAME} in model.safetensors holds -inf at \[3, 5\]: .*--allow-nonfinite"):
        loftq_cli.quantize(source, output=tmp_path / "stopped", bits=2, iters=1)
    assert not (tmp_path / "stopped" / "config.json").exists()
    manifest = loftq_cli.quantize(source, output=out, bits=2, iters=1, allow_nonfinite=True)
    kept = next(record for record in manifest.kept if record.tensor == NAME)
    assert kept.reason == "holds -inf at [3, 5]" and kept.rank == 0 and len(manifest.matrices) == 13
    assert f"{NAME} holds -inf at [3, 5] and stays in full precision." in manifest.notes
    assert "- `model.layers.1.mlp.up_proj` holds -inf at [3, 5]" in (out / "README.md").read_text()
    ours, theirs = load_file(out / "model.safetensors")[NAME], load_file(source / "model.safetensors")[NAME]
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), "bit for bit"
    quantized = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "layers.1.mlp.gate_proj" in json.dumps(quantized) and "layers.1.mlp.up_proj" not in json.dumps(quantized)
    assert loftq_cli.load(out, trainable=True) is not None
    loftq_cli.quantize(config=out / "loftq.yaml", output=tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    notes = loftq_cli.plan(source, allow_nonfinite=True).notes
    assert any(note.startswith("no weight was read") for note in notes)
