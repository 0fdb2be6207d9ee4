"""`loftq inspect` and `loftq verify` of merged models and of checkpoints that were never converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import loftq, sentence
from support.hub_server import HubServer
from support.trained_llama import CHECKPOINT

import loftq_cli
from loftq_cli.artifacts.manifest import is_sealed


@pytest.fixture(scope="module")
def merged(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same adapter merged into dense weights, packed zeros, and quantized again."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = {"bits": 4, "method": "qa-lora", "group_size": 32, "rank": 2, "iters": 1}
    loftq_cli.quantize(random_llama, output=folder / "out", **recipe)
    for to in ("dense", "zeros", "requantize"):
        options = {"to": to, "max_shard_size": "40KB" if to == "dense" else "5GB"}
        loftq_cli.merge(folder / "out", folder / "out" / "loftq_init", output=folder / to, **options)
    return {to: folder / to for to in ("dense", "zeros", "requantize")}


@pytest.mark.parametrize("to", ["dense", "zeros", "requantize"])
def test_every_file_of_a_merge_is_checked(to: str, merged: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged[to], tmp_path / "copy"))
    found = loftq_cli.verify(copy)
    names = sorted(path.name for path in copy.iterdir())
    assert found.ok and found.kind == "merge" and found.files == len(names)
    assert found.nbytes == sum((copy / name).stat().st_size for name in names)
    assert is_sealed((copy / "loftq_merge.json").read_bytes())
    for name in names:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert name in [problem.name for problem in loftq_cli.verify(copy).problems], name
        (copy / name).write_bytes(content)
    (copy / "more.txt").write_text("x")
    assert "more.txt is not part" in loftq("verify", copy, code=3).stdout
    assert "which" in sentence(loftq("verify", merged[to], "--source", tmp_path, code=2))


def test_a_merge_of_an_older_loftq_is_checked_as_a_checkpoint(merged: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged["dense"], tmp_path / "copy"))
    values = json.loads((copy / "loftq_merge.json").read_text())
    old = {name: value for name, value in values.items() if name not in ("files", "digest")}
    (copy / "loftq_merge.json").write_text(json.dumps(old, indent=1))
    found = loftq_cli.verify(copy)
    assert found.ok and found.kind == "merge" and found.tensors > 10
    (copy / "loftq_merge.json").write_text("[")
    assert "loftq_merge.json is damaged" in loftq("verify", copy, code=3).stdout


def test_a_checkpoint_that_was_never_converted(tmp_path: Path) -> None:
    shown = loftq("verify", CHECKPOINT).stdout
    assert "is complete: 57 tensors in 5 files" in shown and "no hashes are recorded" in shown
    assert loftq_cli.verify(CHECKPOINT).kind == "checkpoint"
    copy = Path(shutil.copytree(CHECKPOINT, tmp_path / "copy"))
    shard = next(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, shard, metadata={"format": "pt"})
    found = loftq_cli.verify(copy)
    assert [str(problem) for problem in found.problems] == [f"{name} contains NaN or infinity"]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "cannot be read" in loftq("verify", copy, code=3).stdout
    shard.unlink()
    assert "is missing" in loftq("verify", copy, code=3).stdout
    (tmp_path / "empty").mkdir()
    sentence(loftq("verify", tmp_path / "empty", code=1))


def test_inspect_lists_tensors_of_any_model(merged: dict[str, Path], hub: HubServer) -> None:
    hub.add("org/plain", CHECKPOINT)
    for name in (str(CHECKPOINT), "org/plain"):
        shown = loftq("inspect", name).stdout
        assert "model.layers.5.mlp.down_proj.weight" in shown and "LlamaForCausalLM, not a conversion: " in shown
        values = json.loads(loftq("inspect", name, "--json").stdout)
        assert len(values["tensors"]) == 57 and values["files"] == 5 and values["merge"] is None
        stored = {k: v for file in CHECKPOINT.glob("*.safetensors") for k, v in load_file(file).items()}
        assert values["parameters"] == sum(tensor.numel() for tensor in stored.values())
        assert values["nbytes"] == sum(tensor.nbytes for tensor in stored.values()) and values["dtype"] == "BF16"
    assert "merged by loftq (dense): an adapter was added to 14 matrices" in loftq("inspect", merged["dense"]).stdout
    for to in ("zeros", "requantize"):
        assert "14 matrices" in loftq("inspect", merged[to]).stdout
    assert not any("safetensors" in request.path for request in hub.requests("/org/plain", range="")), "headers only"


def test_inspect_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    assert "there is no directory" in sentence(loftq("inspect", tmp_path / "nowhere", code=1))
    assert "holds no loftq.json" in sentence(loftq("inspect", tmp_path, code=1))
