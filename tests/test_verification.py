"""`loftq verify` finds any change of any output file, and with the source recomputes every residual."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import loftq_cli
from loftq_cli.artifacts.manifest import NAME, is_sealed, render, seal
from loftq_cli.cli import app
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.verification import RELATIVE_TOLERANCE

RECIPE = {"bits": 2, "rank": 4, "iters": 2, "max_shard_size": "40KB"}


def files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ (1 << bit)]))


@pytest.fixture(scope="module")
def source(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with side files to copy."""
    path = tmp_path_factory.mktemp("source") / "llama"
    shutil.copytree(random_llama, path)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "LICENSE").write_text("free\n")
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    loftq_cli.quantize(source, output=out, **RECIPE)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_fresh_output_is_right_and_counts_everything(finished: Path, copy: Path) -> None:
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # which the Hub adds
    steps = []
    found = loftq_cli.verify(copy, progress=steps.append)
    assert found.ok and found.problems == () and found.matrices == 0
    assert found.files == len(files(finished)) and "tokenizer.json" in files(finished)
    assert found.nbytes == sum((finished / name).stat().st_size for name in files(finished))
    assert steps[-1].done == steps[-1].total > 0


def test_a_flipped_bit_is_found_in_every_file_and_named(finished: Path) -> None:
    rng = random.Random(0)
    for name in files(finished):
        size = (finished / name).stat().st_size
        for position in {0, size - 1, rng.randrange(size)}:
            bit = rng.randrange(8)
            flip(finished / name, position, bit)
            found = loftq_cli.verify(finished)
            flip(finished / name, position, bit)
            assert [problem.name for problem in found.problems] == [name], f"bit {bit} of byte {position} of {name}"
    assert loftq_cli.verify(finished).ok


def test_any_flipped_bit_of_the_manifest_breaks_its_digest(finished: Path) -> None:
    content = (finished / NAME).read_bytes()
    assert is_sealed(content) and seal(content) == content
    rng = random.Random(1)
    digest = content.index(loftq_cli.read_manifest(finished).digest.encode())
    for position in [*rng.sample(range(len(content)), 60), *range(digest - 14, digest + 66)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        assert not is_sealed(bytes(damaged)), position


def test_missing_cut_and_foreign_files(copy: Path) -> None:
    (copy / "LICENSE").unlink()
    os.truncate(copy / "loftq.yaml", 10)
    (copy / "adapter_config.json").write_text("{}")  # transformers would load it together with the backbone
    found = loftq_cli.verify(copy)
    assert {problem.name: problem.what.split()[0] for problem in found.problems} == {
        "LICENSE": "is",
        "loftq.yaml": "is",
        "adapter_config.json": "is",
    }
    assert "LICENSE is missing" in [str(problem) for problem in found.problems]
    (copy / NAME).unlink()
    assert [problem.name for problem in loftq_cli.verify(copy).problems] == [NAME]


@pytest.mark.parametrize("changes", [{}, {"format": "dense"}, {"format": "bnb", "bits": 4}, {"alpha": 1.0, "seed": 7}])
def test_residuals_are_recomputed_from_the_files(changes: dict, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(source, output=out, **{**RECIPE, **changes})
    found = loftq_cli.verify(out, source=source)
    assert found.ok, found.problems
    assert (found.matrices, found.kept) == (len(manifest.matrices), len(manifest.kept)) and found.kept > 0
    assert 0 < found.largest_deviation <= RELATIVE_TOLERANCE


def test_embeddings_conv1d_qlora_and_float16(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).half().save_pretrained(
        tmp_path / "gpt"
    )
    for name, recipe in {
        "adapted": {"bits": 2, "embeddings": "adapt", "iters": 2},
        "plain": {"bits": 8, "method": "qlora"},
        "float32": {"bits": 3, "dtype": "float32", "iters": 1, "rule": ["attn=dense"]},
    }.items():
        loftq_cli.quantize(tmp_path / "gpt", output=tmp_path / name, rank=4, **recipe)
        found = loftq_cli.verify(tmp_path / name, source=tmp_path / "gpt")
        assert found.ok and found.matrices, found.problems


def test_another_source_and_a_false_manifest_are_found(copy: Path, source: Path, tmp_path: Path) -> None:
    """A rewritten manifest can match its own digest while its numbers are false."""
    manifest = loftq_cli.read_manifest(copy)
    first = dataclasses.replace(manifest.matrices[0], residual=manifest.matrices[0].residual * 0.99)
    false = dataclasses.replace(manifest, matrices=(first, *manifest.matrices[1:]))
    (copy / NAME).write_bytes(seal(render(false)))
    assert loftq_cli.verify(copy).ok
    found = loftq_cli.verify(copy, source=source)
    assert [problem.name for problem in found.problems] == [first.tensor]
    (copy / NAME).write_bytes(seal(render(manifest)))

    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(source, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    changed = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    for name in changed:
        weights[name] = weights[name] * 1.01 + 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    found = loftq_cli.verify(copy, source=other)
    assert sorted(problem.name for problem in found.problems) == changed
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    found = loftq_cli.verify(copy, source=other)
    assert "not the model the conversion was made from" in found.problems[0].what


def test_records_that_do_not_fit_the_files_are_differences(copy: Path, source: Path) -> None:
    """A rewritten manifest can claim anything."""
    manifest = loftq_cli.read_manifest(copy)
    first, kept = manifest.matrices[0], manifest.kept[0]
    misfit = "cannot be read from the files as loftq.json describes it"
    for matrices, others, said in (
        ([dataclasses.replace(first, module="nowhere")], [], misfit),
        ([dataclasses.replace(first, block_size=first.block_size * 2)], [], misfit),
        ([dataclasses.replace(first, shape=(3, 5))], [], f"is {list(first.shape)} in the source, but"),
        ([dataclasses.replace(first, tensor="nowhere")], [], "is not a tensor of the source"),
        ([first], [dataclasses.replace(kept, tensor="nowhere[x]")], "is not a tensor of the source"),
    ):
        false = dataclasses.replace(
            manifest, matrices=(*matrices, *manifest.matrices[1:]), kept=(*others, *manifest.kept[1:])
        )
        (copy / NAME).write_bytes(seal(render(false)))
        (problem,) = loftq_cli.verify(copy, source=source).problems
        assert problem.name == (others or matrices)[0].tensor and problem.what.startswith(said)


def test_no_header_is_parsed_once_for_every_tensor(copy: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.artifacts import tensor_reader

    parse, parsed = tensor_reader.parse_header, []

    def count(path: Path, raw: bytes, size: int) -> list:
        parsed.append(path)
        return parse(path, raw, size)

    monkeypatch.setattr(tensor_reader, "parse_header", count)
    assert loftq_cli.verify(copy, source=source).ok
    assert len(parsed) == len(set(parsed)) == len(list(copy.rglob("*.safetensors"))) > 2


def test_a_manifest_that_cannot_be_read_is_named_with_its_field(copy: Path) -> None:
    values = json.loads((copy / NAME).read_bytes())
    values["matrices"][2]["bits"] = "x"
    (copy / NAME).write_text(json.dumps(values))
    (problem,) = loftq_cli.verify(copy).problems
    assert str(problem) == "loftq.json is damaged (matrices[2].bits must be one of 2, 3, 4 or 8, not 'x')"


def test_command_line(copy: Path, source: Path, tmp_path: Path) -> None:
    def run(*words: object):
        return CliRunner().invoke(app, ["verify", *map(str, words)])

    good = run(copy, "--source", source)
    assert good.exit_code == ExitCode.DONE and "is as it was written" in good.stdout and "residuals" in good.stdout
    assert json.loads(run(copy, "--json").stdout)["ok"] is True
    flip(copy / "README.md", 5, 0)
    bad = run(copy)
    assert bad.exit_code == ExitCode.VERIFICATION_FAILED
    assert "README.md is damaged" in bad.stdout and "1 difference" in bad.stderr
    told = json.loads(run(copy, "--json").stdout)
    assert told["ok"] is False and told["problems"][0]["name"] == "README.md"
    assert run(tmp_path / "nowhere").exit_code == ExitCode.FAILED
    (tmp_path / "half" / ".loftq").mkdir(parents=True)
    half = run(tmp_path / "half")
    assert half.exit_code == ExitCode.INCOMPLETE and "is not finished" in half.stderr


def test_a_directory_between_the_last_renames_is_not_finished(copy: Path) -> None:
    (copy / ".loftq").mkdir()
    assert loftq_cli.verify(copy).ok, "config.json is written last, so leftover state is harmless"
    (copy / "config.json").unlink()
    with pytest.raises(LoftqError, match="is not finished") as caught:
        loftq_cli.verify(copy)
    assert caught.value.exit_code == ExitCode.INCOMPLETE
