"""Pickled sources and the precedence of formats: the same output as from safetensors, and nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
import typer.testing
from safetensors.torch import load_file, save_file
from support.pickles import CONFIGS, as_pickle

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError

LAYOUTS = {
    "single": {},
    "legacy": {"legacy": True},
    "sharded": {"shards": 3},
    "sharded without index": {"shards": 2, "index": False},
    "sharded legacy": {"shards": 2, "legacy": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pickles_give_the_bytes_of_safetensors(layout: dict, random_llama: Path, tmp_path: Path) -> None:
    source = as_pickle(random_llama, tmp_path / "pickled", **layout)
    recipe = {"bits": 2, "rank": 4, "iters": 1}
    loftq_cli.quantize(random_llama, output=tmp_path / "a", **recipe)
    loftq_cli.quantize(source, output=tmp_path / "b", **recipe)
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors", "config.json", *CONFIGS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("family", ["llama_tied", "t5"])
def test_tied_weights_of_a_pickle_are_written_once(family: str, tmp_path: Path) -> None:
    """A pickle contains both names of a tied weight, safetensors only one; the output is the same."""
    from support.families import FAMILIES

    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    state = dict(model.state_dict())
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("safe", "pickled"):
        loftq_cli.quantize(tmp_path / name, output=tmp_path / f"{name}-out", bits=2, rank=4, iters=1)
    one, other = ((tmp_path / f"{name}-out" / "model.safetensors").read_bytes() for name in ("safe", "pickled"))
    assert one == other


def test_views_and_training_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    big = torch.arange(24.0).reshape(4, 6)
    state = {
        "a": big[1:3],
        "b": big.T,
        "c": torch.nn.Parameter(big),
        "d": torch.tensor(3),
        "half": big.bfloat16(),
        "none": torch.empty(0, 4),
        "version": 7,
    }
    for nested in (state, {"state_dict": state, "epoch": 3}, {"model": state, "step": torch.tensor(1)}):
        torch.save(nested, tmp_path / "pytorch_model.bin")
        checkpoint = open_checkpoint(tmp_path)
        assert set(checkpoint.tensors) == set(state) - {"version"}
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            assert torch.equal(tensor, state[name]) and tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == checkpoint.tensors[name].nbytes
        checkpoint.close()


def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read into the memory they are wanted in."""
    from loftq_cli.checkpoint import pickled

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    state = {f"w{i}": torch.ones(1024, 1024) for i in range(24)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    del state
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    reader = pickled.local_pickles(tmp_path, ["pytorch_model.bin"])
    target = torch.empty(1024, 1024)
    reader.copy("pytorch_model.bin", "w0", target)
    before = resident()
    most = 0
    for name in checkpoint.tensors:
        reader.copy("pytorch_model.bin", name, target)
        most = max(most, resident() - before)
    assert most < 32 << 20 < 24 * target.numel() * 4


class Harm:
    """A malicious object: it makes a call when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def hostile(kind: str, path: Path, mark: Path) -> None:
    weights = {"a.weight": torch.ones(2, 2), "b": Harm(mark)}
    if kind == "zip":
        torch.save(weights, path)
    elif kind == "legacy":
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(weights, protocol=2))
    elif kind == "truncated":
        torch.save({"a.weight": torch.ones(200, 200)}, path)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "half a zip":
        torch.save({"a.weight": torch.ones(200, 200)}, path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "compressed":
        torch.save({"a.weight": torch.ones(200, 200)}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    elif kind == "no tensors":
        torch.save({"a": 1, "b": [torch.ones(2)]}, path)
    elif kind == "a list":
        torch.save([torch.ones(2)], path)
    elif kind == "sparse":
        torch.save({"a.weight": torch.eye(3).to_sparse()}, path)
    elif kind == "complex":
        torch.save({"a.weight": torch.ones(2, 2, dtype=torch.complex64)}, path)
    elif kind == "endless view":
        torch.save({"a.weight": torch.ones(1).expand(2**20, 2**20)}, path)
    else:
        path.write_bytes({"empty": b"", "garbage": b"\x80\x02garbage", "text": b"version https://git-lfs"}[kind])


KINDS = {
    "zip": "tries to run", "legacy": "tries to run", "plain pickle": "tries to run", "truncated": "download it again",
    "half a zip": "is not a complete archive", "compressed": "is compressed", "no tensors": "contains no named tensors",
    "a list": "contains no named tensors", "sparse": "unsupported type sparse", "complex": "unsupported type complex64",
    "endless view": "larger than the data in the file", "empty": "is damaged", "garbage": "is damaged",
    "text": "is damaged",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_and_damaged_pickles_end_in_one_sentence(kind: str, random_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((random_llama / "config.json").read_bytes())
    hostile(kind, source / "pytorch_model.bin", tmp_path / "harm done")
    words = ["quantize", str(source), "-o", str(tmp_path / "out")]
    result = typer.testing.CliRunner().invoke(app, words)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 1 and len(lines) == 1 and lines[0].startswith("loftq: "), result.output
    assert KINDS[kind] in lines[0] and not (tmp_path / "harm done").exists() and not (tmp_path / "out").exists()


def test_a_pickle_cut_off_while_it_is_read_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a.weight": torch.ones(300, 300)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "pytorch_model.bin", 3_000)
    with pytest.raises(LoftqError, match=r"pytorch_model\.bin is shorter than its central directory says"):
        checkpoint.read("a.weight")
    checkpoint.close()


NUMBER = b"\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85"
ENORMOUS = {
    "bytes by global": (b"cbuiltins\nbytearray\n" + NUMBER + b"R", "run builtins.bytearray"),
    "bytes by name": (b"\x8c\x08builtins\x8c\x09bytearray\x93" + NUMBER + b"R", "bytearray"),
    "bytes anew": (b"cbuiltins\nbytearray\n" + NUMBER + b"\x81", "run builtins.bytearray"),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ENORMOUS)
def test_small_pickles_that_ask_for_gigabytes_are_refused(kind: str, legacy: bool, tmp_path: Path) -> None:
    call, said = ENORMOUS[kind]
    (tmp_path / "config.json").write_text("{}")
    body = b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."
    write_pickle(tmp_path / "pytorch_model.bin", body, legacy=legacy)
    tracemalloc.start()
    try:
        with pytest.raises(LoftqError, match=said):
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("builtin", ["builtins\nset", "collections\nCounter"])
def test_pickles_do_not_iterate_over_endless_tensors(builtin: str, tmp_path: Path) -> None:
    """A view with a stride of zero has any number of rows."""
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(1).expand(2**40)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        body = archive.read(name)
    assert body.startswith(b"\x80\x02}") and body.endswith(b"s.")
    tensor = body[body.index(b"ctorch._utils") : -2]
    body = b"\x80\x02}X\x01\x00\x00\x00a" + f"c{builtin}\n".encode() + tensor + b"\x85Rs."
    write_pickle(tmp_path / "pytorch_model.bin", body, legacy=False)
    with pytest.raises(LoftqError, match=r"pytorch_model\.bin is damaged or is not a weight file"):
        open_checkpoint(tmp_path)


def write_pickle(path: Path, body: bytes, *, legacy: bool) -> None:
    """Write a pickle as `torch.save` frames it."""
    if legacy:
        machine = {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}
        head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, machine)
        path.write_bytes(b"".join(pickle.dumps(value, protocol=2) for value in head) + body + pickle.dumps([]))
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(16))


def test_pickles_with_the_other_byte_order(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int16)}
    (tmp_path / "config.json").write_text("{}")
    torch.save(state, tmp_path / "own.bin")
    with (
        zipfile.ZipFile(tmp_path / "own.bin") as archive,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as other,
    ):
        for name in archive.namelist():
            content = archive.read(name)
            if "/data/" in name:
                width = 4 if name.endswith("/0") else 2
                content = b"".join(content[at : at + width][::-1] for at in range(0, len(content), width))
            other.writestr(name, b"big" if name.endswith("byteorder") else content)
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_incomplete_shards_are_named(random_llama: Path, tmp_path: Path) -> None:
    source = as_pickle(random_llama, tmp_path / "pickled", shards=3)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(LoftqError, match=r"shard pytorch_model-00002-of-00003.bin .* is missing"):
        open_checkpoint(source)
    (source / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(LoftqError, match="holds 2 of 3 shards"):
        open_checkpoint(source)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(LoftqError, match="not a shard of this directory"):
        open_checkpoint(source)


def test_safetensors_win_over_pickles(random_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(random_llama, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"never opened")
    (tmp_path / "both" / "consolidated.00.pth").write_bytes(b"never opened")
    (tmp_path / "both" / "params.json").write_text("{}")
    assert open_checkpoint(tmp_path / "both").fingerprint == open_checkpoint(random_llama).fingerprint


@pytest.mark.parametrize("name", ["tf_model.h5", "model.gguf", "flax_model.msgpack"])
def test_unsupported_formats_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(LoftqError, match=f"{name}, which loftq does not read"):
        open_checkpoint(tmp_path)


def test_sharded_safetensors_give_the_bytes_of_a_single_file(random_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(random_llama / "model.safetensors")
    (tmp_path / "parts").mkdir()
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "parts" / f"part{i:02d}.safetensors")
    (tmp_path / "parts" / "config.json").write_bytes((random_llama / "config.json").read_bytes())
    for source, out in ((random_llama, "a"), (tmp_path / "parts", "b")):
        loftq_cli.quantize(source, output=tmp_path / out, bits=2, method="qlora")
    one, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in "ab")
    assert one == other
