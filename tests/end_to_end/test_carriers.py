"""One model, however it is carried: the same bytes from safetensors, pickles, Meta's files and the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.hub_server import HubServer
from support.meta_reference import make_reference, tiktoken_file, tiktoken_ranks, write_meta
from support.pickles import as_pickle

import loftq_cli

RECIPE = {"bits": 2, "rank": 4, "iters": 1, "max_shard_size": "60KB"}
# Fields of loftq.json that say where from and where to, and the hash of it all, measured times included.
NAMES_SOURCE = {"source", "source_revision", "output", "digest"}
MEASURED = {"totals": {"seconds", "peak_memory_bytes", "peak_device_memory_bytes"}, "matrices": {"seconds"}}


def sharded(source: Path, target: Path) -> Path:
    """As transformers 4 shards: in the model's own order, several layers a file."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    (target / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors, key=lambda name: (name == "lm_head.weight", "layers.0" not in name, name))
    index = {}
    for i in range(4):
        file = f"model-{i + 1:05d}-of-00004.safetensors"
        part = names[i * len(names) // 4 : (i + 1) * len(names) // 4]
        save_file({name: tensors[name] for name in part}, target / file)
        index |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target


def normalized(out: Path) -> dict[str, object]:
    """Every file but those of weights, without what names the source and what a clock or a meter says."""
    files: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        name = path.relative_to(out).as_posix()
        if name == "loftq.json":
            values = json.loads(path.read_text())
            for key in ("loftq.yaml", "README.md", "loftq_init/adapter_config.json"):
                del values["files"][key]  # their hashes
            for key in ("model", "revision"):
                del values["recipe"][key]
            for key, measured in MEASURED.items():
                for record in values[key] if isinstance(values[key], list) else [values[key]]:
                    for field in measured:
                        del record[field]
            files[name] = {key: value for key, value in values.items() if key not in NAMES_SOURCE}
        elif name == "loftq.yaml":
            values = yaml.safe_load(path.read_text())
            files[name] = {key: value for key, value in values.items() if key not in ("model", "revision")}
        elif name == "loftq_init/adapter_config.json":
            values = json.loads(path.read_text())
            assert values.pop("base_model_name_or_path") == str(out)
            files[name] = values
        elif name != "README.md":  # a page about the source, with the time it took
            files[name] = path.read_bytes()
    return files


def weights(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.safetensors")}


CARRIERS: dict[str, Callable[[Path, Path], Path]] = {
    "safetensors": lambda source, _: source,
    "safetensors in four shards": sharded,
    "bin": as_pickle,
    "bin of the old kind": lambda source, target: as_pickle(source, target, legacy=True),
    "bin in three shards": lambda source, target: as_pickle(source, target, shards=3),
}


@pytest.fixture(scope="module")
def expected(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    loftq_cli.quantize(random_llama, output=out, **RECIPE)
    assert len(weights(out)) > 3
    return out


@pytest.mark.parametrize("way", ["directory", "streamed", "cached"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_same_bytes(
    carrier: str, way: str, expected: Path, random_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Weight files byte for byte; everything else but for the fields that name the source."""
    folder, out = CARRIERS[carrier](random_llama, tmp_path / "source"), tmp_path / "out"
    if way == "directory":
        loftq_cli.quantize(folder, output=out, **RECIPE)
    else:
        hub: HubServer = request.getfixturevalue("hub")
        hub.add("some-org/model", folder)
        loftq_cli.quantize("some-org/model", output=out, stream=way == "streamed", **RECIPE)
    assert weights(out) == weights(expected)
    assert normalized(out) == normalized(expected)


def test_same_bytes_from_metas_files(hub: HubServer, tmp_path: Path) -> None:
    """The literal command's kind of repository: in a directory, streamed, and the one file that one rank would have."""
    ranks = tiktoken_ranks(0)
    small = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "rope_theta": 500000.0}
    reference = make_reference(vocab=len(ranks) + 256, **small)
    outs = []
    for count, below in ((2, ""), (1, ""), (2, "original/")):
        folder = write_meta(reference, tmp_path / f"meta{len(outs)}" / below, ranks=count, embedding_dim=0)
        (folder / "tokenizer.model").write_bytes(tiktoken_file(ranks))
        outs.append(tmp_path / f"out{len(outs)}")
        loftq_cli.quantize(folder, output=outs[-1], **RECIPE)
        hub.add("meta/Llama", {below + path.name: path.read_bytes() for path in folder.iterdir()})
        outs.append(tmp_path / f"out{len(outs)}")
        loftq_cli.quantize("meta/Llama", output=outs[-1], stream=True, **RECIPE)
        assert not list(tmp_path.glob("home/**/*.pth"))
    for out in outs[1:]:
        assert weights(out) == weights(outs[0]) and normalized(out) == normalized(outs[0])
