"""Models on the Hub: the real huggingface_hub client against a Hub server on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, load_file
from support.hub_server import HubServer, environment
from support.meta_reference import make_reference, sentencepiece_model, write_meta

import loftq_cli
from loftq_cli.checkpoint import open_source
from loftq_cli.checkpoint.remote import ranges as remote
from loftq_cli.checkpoint.remote.model import HubModel, choose_weights, parse_model
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.hub import retry
from loftq_cli.recipe.model import Recipe

REPO = "some-org/Tiny-Llama"
QUICK = {"bits": 2, "rank": 4, "iters": 1}
WEIGHTS = ("model.safetensors", "loftq_init/adapter_model.safetensors")
SIDE = {
    "README.md": b"---\nlicense: mit\n---\n# Tiny\n",
    "tokenizer_config.json": b"{}",
    "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}, {"path": ".."}]',
    "1_Pooling/config.json": b"{}",
}
NOT_NEEDED = {
    "pytorch_model.bin": b"x",
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
    "onnx/model.onnx": b"x",
    "onnx/config.json": b"{}",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"x",
    "adapter_model.safetensors": b"x",
    "consolidated.safetensors": b"x",
    "modeling_tiny.py": b"raise SystemExit",
    "image.png": b"x",
}

NOT_NEEDED_PATTERN = "|".join(rf"/{name}$" for name in NOT_NEEDED)


@pytest.fixture
def llama(random_llama: Path) -> dict[str, bytes]:
    """The files of a repository with every kind of file that repositories contain."""
    return {path.name: path.read_bytes() for path in random_llama.iterdir()} | SIDE | NOT_NEEDED


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def weight_files(home: Path) -> list[str]:
    """Weight files in the cache, blobs included, recognised by their size."""
    return [path.name for path in home.rglob("*") if path.is_file() and path.stat().st_size > 50_000]


def read_all(stream: bool = True, **recipe: object) -> dict[str, torch.Tensor]:
    with open_source(Recipe(REPO, **recipe), stream=stream) as (checkpoint, _):
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def refused(code: ExitCode = ExitCode.FAILED, **how: object) -> str:
    with pytest.raises(LoftqError) as caught:
        loftq_cli.plan(**{"model": REPO, **how})
    assert "\n" not in str(caught.value) and caught.value.exit_code == code, str(caught.value)
    assert "secret" not in str(caught.value) and "hf_" not in str(caught.value)
    return str(caught.value)


def test_names_of_models_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert parse_model("org/name", None) == HubModel("org/name")
    assert parse_model("org/name@refs/pr/1", None) == HubModel("org/name", "refs/pr/1")
    assert parse_model("org/name", "v1") == parse_model("org/name@v1", "v1") == HubModel("org/name", "v1")
    for path in ("here/model", "./org/name", "../name", "/org/name", "name", "a/b/c", "org/name.", "-org/name"):
        assert parse_model(path, None) == Path(path)
    for model, revision in (("org/name@v1", "v2"), ("here/model", "v1")):
        with pytest.raises(UsageError, match=r"contradict|is a local path"):
            parse_model(model, revision)
    with pytest.raises(UsageError, match="--stream is for a model on the Hub"):
        loftq_cli.plan("here/model", stream=True)
    with pytest.raises(UsageError, match="--revision cannot be"):
        loftq_cli.plan("org/name", revision=17)


def test_same_bytes_from_directory_cache_and_stream(
    hub: HubServer, llama: dict[str, bytes], random_llama: Path, home: Path, tmp_path: Path
) -> None:
    repo = hub.add(REPO, llama)
    streamed = loftq_cli.quantize(REPO, output=tmp_path / "streamed", stream=True, **QUICK)
    assert weight_files(home) == []
    assert not hub.requests(NOT_NEEDED_PATTERN)
    cached = loftq_cli.quantize(REPO, output=tmp_path / "cached", **QUICK)
    assert weight_files(home) and not hub.requests(NOT_NEEDED_PATTERN)
    loftq_cli.quantize(random_llama, output=tmp_path / "local", **QUICK)
    for name in WEIGHTS:
        files = [load_file(tmp_path / kind / name) for kind in ("local", "cached", "streamed")]
        assert same(files[0], files[1]) and same(files[0], files[2])
    names = {path.relative_to(tmp_path / "cached") for path in (tmp_path / "cached").rglob("*") if path.is_file()}
    for name in names - {Path("loftq.json"), Path("README.md"), Path("loftq_init/adapter_config.json")}:
        assert (tmp_path / "cached" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    assert cached.fingerprint == streamed.fingerprint
    assert streamed.source == REPO and streamed.source_revision == repo.refs["main"]
    assert (tmp_path / "streamed" / "1_Pooling" / "config.json").is_file()
    card = (tmp_path / "streamed" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == REPO and front["license"] == "mit" and repo.refs["main"] in card
    assert f"loftq quantize {REPO} " in card and str(home) not in card


def test_the_written_recipe_names_the_commit(
    hub: HubServer, llama: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repo = hub.add(REPO, llama)
    first = repo.refs["main"]
    manifest = loftq_cli.quantize(REPO, stream=True, **QUICK)
    assert manifest.output == str(tmp_path / "Tiny-Llama-loftq-2bit-r4")
    out = Path(manifest.output)
    written = yaml.safe_load((out / "loftq.yaml").read_text())
    assert written["model"] == REPO and written["revision"] == first
    repo.commit({**llama, "config.json": llama["config.json"] + b" "})
    assert repo.refs["main"] != first
    loftq_cli.quantize(config=out / "loftq.yaml", output="again", stream=True)
    for name in (*WEIGHTS, "loftq.yaml"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert loftq_cli.plan(f"{REPO}@main").recipe.revision == repo.refs["main"]


def test_resuming_with_another_commit_is_refused(hub: HubServer, llama: dict[str, bytes], tmp_path: Path) -> None:
    """It may contain other weights under the same names, which headers cannot show."""
    repo = hub.add(REPO, llama)
    first = repo.refs["main"]
    hub.fail("", host="cdn", range="bytes=[1-9][0-9]{5}", status=404, times=1_000)
    with pytest.raises(LoftqError):
        loftq_cli.quantize(REPO, output=tmp_path / "out", stream=True, **QUICK)
    hub.failures.clear()
    repo.commit({**llama, "config.json": llama["config.json"] + b" "})
    assert loftq_cli.plan(f"{REPO}@{first}").fingerprint == loftq_cli.plan(REPO).fingerprint
    with pytest.raises(UsageError, match=f"unfinished conversion with revision {first} \\(now {repo.refs['main']}"):
        loftq_cli.quantize(REPO, output=tmp_path / "out", stream=True, **QUICK)
    assert loftq_cli.quantize(f"{REPO}@{first}", output=tmp_path / "out", stream=True, **QUICK).source_revision == first


def test_plan_reads_headers_only(hub: HubServer, llama: dict[str, bytes], home: Path) -> None:
    hub.add(REPO, llama)
    length = 8 + int.from_bytes(llama["model.safetensors"][:8], "little")
    for stream in (True, False):
        hub.log.clear()
        assert len(loftq_cli.plan(REPO, stream=stream, bits=2).matrices) == 14
        assert [entry.range for entry in hub.requests(host="cdn")] == ["bytes=0-7", f"bytes=8-{length - 1}"]
    assert weight_files(home) == []


def test_the_token_stays_with_the_hub(
    hub: HubServer, llama: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, llama, private=True)
    hub.tokens["hf_mine"] = {REPO}
    assert "log in with `hf auth login` if it is private" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.log.clear()
    for stream in (True, False):
        loftq_cli.quantize(REPO, output=tmp_path / f"out{stream}", stream=stream, **QUICK)
    assert {entry.authorization for entry in hub.requests(host="hub")} == {"Bearer hf_mine"}
    assert {entry.authorization for entry in hub.requests(host="cdn")} == {None}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(b"hf_mine" in path.read_bytes() for path in written)


def test_sharded_weights(hub: HubServer, random_llama: Path) -> None:
    from transformers import LlamaForCausalLM

    model, folder = LlamaForCausalLM.from_pretrained(random_llama), random_llama.parent / "sharded"
    model.save_pretrained(folder, max_shard_size="200KB")
    repo = hub.add(REPO, folder)
    hub.log.clear()
    assert same(read_all(), load_file(random_llama / "model.safetensors"))
    files = dict(repo.commits[repo.refs["main"]])
    shard = next(name for name in files if name.startswith("model-00002-of-"))
    del files[shard]
    repo.commit(files)
    assert f"shard {shard}" in refused()


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights(
    legacy: bool, hub: HubServer, llama: dict[str, bytes], random_llama: Path, home: Path, tmp_path: Path
) -> None:
    weights = load_file(random_llama / "model.safetensors")
    wide = torch.arange(60_000.0).reshape(200, 300)
    weights |= {"view": wide[3:70, 5:], "turned": wide.T, "half": wide.bfloat16(), "none": torch.empty(0, 4)}
    torch.save(weights, tmp_path / "saved.bin", _use_new_zipfile_serialization=not legacy)
    binary = {"config.json": llama["config.json"], "pytorch_model.bin": (tmp_path / "saved.bin").read_bytes()}
    hub.add(REPO, {**binary, "training_args.bin": b"x", "tf_model.h5": b"x"})
    assert same(read_all(stream=True), weights) and weight_files(home) == []
    if not legacy:
        hub.log.clear()
        loftq_cli.plan(REPO)
        asked = [entry.range.removeprefix("bytes=").split("-") for entry in hub.requests(host="cdn") if entry.range]
        assert sum(int(end) - int(start) + 1 for start, end in asked) < 300_000 < len(binary["pytorch_model.bin"]) // 2
        assert weight_files(home) == []
    assert same(read_all(stream=False), weights)
    assert not hub.requests("training_args|tf_model")


@pytest.mark.parametrize("below", ["", "original/"])
def test_metas_own_files(below: str, hub: HubServer, tmp_path: Path) -> None:
    """`loftq quantize meta-llama/Llama-2-13b`: no config.json anywhere."""
    pytest.importorskip("sentencepiece")
    small = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}
    folder = write_meta(make_reference(vocab=400, **small), tmp_path / "meta", ranks=2, embedding_dim=1)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(400))
    hub.add(REPO, {below + path.name: path.read_bytes() for path in folder.iterdir()} | {"LICENSE.txt": b"terms"})
    with open_source(Recipe(folder.as_posix())) as (checkpoint, _):
        expected = {name: checkpoint.read(name) for name in checkpoint.tensors}
    assert same(read_all(stream=True), expected) and not list(tmp_path.glob("home/**/*.pth"))
    assert same(read_all(stream=False), expected)
    assert "LICENSE.txt" in {side.name for side in loftq_cli.plan(REPO).side_files}


@pytest.mark.parametrize(
    ("names", "kind", "files"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "x.safetensors"], "safetensors", 1),
        (["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"], "safetensors", 0),
        (["config.json", "a.safetensors", "b.safetensors", "adapter_model.safetensors"], "safetensors", 2),
        (["config.json", "pytorch_model.bin", "training_args.bin", "original/params.json"], "pickled", 1),
        (["config.json", "pytorch_model-00001-of-00001.bin", "onnx/model.safetensors"], "pickled", 1),
        (["config.json", "pytorch_model.bin.index.json"], "pickled", 0),
        (["params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"], "meta", 2),
        (["config.json", "original/params.json", "original/consolidated.00.pth"], "meta", 1),
    ],
)
def test_weights_in_one_format_are_chosen(names: list[str], kind: str, files: int) -> None:
    chosen = choose_weights(HubModel(REPO), names)
    assert chosen.kind == kind and len(chosen.files) == files and set(chosen.files) <= set(names)


def test_transient_failures_are_retried(
    hub: HubServer, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, llama)
    monkeypatch.setattr(remote, "_CHUNK", 7_000)
    asked: list[float] = []
    monkeypatch.setattr(retry, "_sleep", lambda seconds, _stop: asked.append(seconds))
    hub.fail("/api/models/.*", status=500)
    hub.fail("config.json", status=502, method="HEAD")
    hub.fail("model.safetensors", status=503, method="HEAD")
    hub.fail("", host="cdn", status=429, headers={"Retry-After": "11"})
    hub.fail("", host="cdn", status=429, headers={"RateLimit": '"api";r=0;t=54'})
    hub.fail("", host="cdn", status=403)
    hub.fail("", host="cdn", cut=1_000, times=5)
    assert same(read_all(), load(llama["model.safetensors"]))
    assert {11.0, 55.0} <= set(asked) and not any(failure.times for failure in hub.failures)


def test_a_cut_transfer_continues_after_the_last_byte(hub: HubServer, llama: dict[str, bytes]) -> None:
    hub.add(REPO, llama)
    with open_source(Recipe(REPO), stream=True) as (checkpoint, _):
        name = "model.layers.0.mlp.up_proj.weight"
        info = checkpoint.tensors[name]
        hub.log.clear()
        hub.fail("", host="cdn", cut=1_000)
        assert torch.equal(checkpoint.read(name), load(llama["model.safetensors"])[name])
    last = info.start + info.nbytes - 1
    ranges = [f"bytes={info.start}-{last}", f"bytes={info.start + 1_000}-{last}"]
    assert [entry.range for entry in hub.requests(host="cdn")] == ranges


def test_expired_links_are_requested_again(hub: HubServer, llama: dict[str, bytes]) -> None:
    hub.add(REPO, llama)
    hub.link_uses = 5
    assert same(read_all(), load(llama["model.safetensors"]))
    heads = hub.requests("resolve/.*model.safetensors", method="HEAD")
    assert 4 <= len(heads) < len(hub.requests(host="cdn")) / 4


def test_the_same_command_continues_after_the_last_attempt(
    hub: HubServer, llama: dict[str, bytes], random_llama: Path, tmp_path: Path
) -> None:
    hub.add(REPO, llama)
    with open_source(Recipe(REPO), stream=True) as (checkpoint, _):
        late = checkpoint.tensors["model.layers.1.self_attn.v_proj.weight"]
    whole = loftq_cli.quantize(REPO, output=tmp_path / "whole", stream=True, **QUICK)
    hub.fail("", host="cdn", range=f"bytes={late.start}-", status=503, times=1_000)
    with pytest.raises(LoftqError, match="run the same command again to continue") as caught:
        loftq_cli.quantize(REPO, output=tmp_path / "out", stream=True, **QUICK)
    assert caught.value.exit_code == ExitCode.INCOMPLETE and "secret" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()
    hub.failures.clear()
    manifest = loftq_cli.quantize(REPO, output=tmp_path / "out", **QUICK)  # the other way to read goes on too
    assert manifest.fingerprint == whole.fingerprint
    for name in WEIGHTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_access_is_refused_in_a_sentence(
    hub: HubServer, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, llama, gated=True)
    for stream in (True, False):
        assert f"{REPO} is gated: request access at {hub.url}/{REPO}, then log in" in refused(stream=stream)
    assert f"{hub.url} has no visible model of that name: check the spelling" in refused(model="some-org/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert "is gated" in refused() and "log in" not in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"does not accept the token: create a new one at {hub.url}/settings/tokens" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.tokens["hf_good"].add(REPO)
    assert "has no revision v9: choose a branch or tag listed at " in refused(revision="v9")
    assert loftq_cli.plan(REPO).matrices


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "model-Q4.gguf": b"x"}, ", only model-Q4.gguf, which loftq does not read"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "is an adapter"),
        ({"model.safetensors": b"x"}, "no config.json"),
        ({"config.json": b"{}"}, "contains no"),
        ({"config.json": b"{}", "model.safetensors": b"x" * 20}, f"{REPO}/model.safetensors is not a complete"),
        ({"config.json": b"{}", "model.safetensors": b""}, f"{REPO}/model.safetensors is not a complete"),
        ({"config.json": b"[]", "model.safetensors": b"x"}, "not a JSON object"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
            "not a shard of this directory",
        ),
    ],
)
def test_repositories_without_readable_weights(hub: HubServer, files: dict[str, bytes], said: str) -> None:
    hub.add(REPO, files)
    assert said in refused(stream=True)


def test_a_host_without_ranges(hub: HubServer, llama: dict[str, bytes]) -> None:
    hub.add(REPO, llama)
    hub.ranges = False
    assert "does not serve parts of files: leave out --stream" in refused(stream=True)


def test_a_host_that_sends_more_than_was_asked_for(
    hub: HubServer, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read to its end: a host could send for ever."""
    hub.add(REPO, llama)
    hub.surplus = 1 << 30
    assert same(read_all(), load(llama["model.safetensors"]))
    assert hub.sent_surplus < 1 << 28


def test_no_signed_link_reaches_a_traceback(hub: HubServer, llama: dict[str, bytes]) -> None:
    hub.add(REPO, llama)
    hub.fail("", host="cdn", status=418, times=1_000)
    with pytest.raises(LoftqError) as caught:
        loftq_cli.plan(REPO, stream=True)
    printed = "".join(traceback.format_exception(caught.value))
    assert "418" in printed and "Signature=***" not in str(caught.value) and "secret-" not in printed, printed


@pytest.mark.parametrize("path", ["/api/models/.*", "config.json"])
@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Retry-After": "31536000"}, "wait 365 days"),
        ({"Retry-After": "9" * 400}, "wait 1000000 days"),
        ({"RateLimit": '"api";r=0;t=7300'}, "wait 2 hours"),
    ],
)
def test_a_server_that_asks_for_a_long_wait(
    path: str,
    headers: dict[str, str],
    said: str,
    hub: HubServer,
    llama: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(REPO, llama)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    for method in ("GET", "HEAD"):
        hub.fail(path, status=429, headers=headers, method=method, times=1_000)
    assert said in refused(ExitCode.INCOMPLETE, stream=True)


def test_offline(hub: HubServer, llama: dict[str, bytes], random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = hub.add(REPO, llama)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and the Hub cache has no complete copy" in refused()
    assert "--stream reads from the Hub" in refused(stream=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loftq_cli.plan(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no complete copy" in refused(), "headers alone are no copy"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    read_all(stream=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert same(read_all(stream=False), load_file(random_llama / "model.safetensors"))
    assert loftq_cli.plan(REPO).recipe.revision == repo.refs["main"] and hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fail("", status=503, times=1_000)
    assert same(read_all(stream=False), load_file(random_llama / "model.safetensors")), "the Hub is down"
    assert "HTTP status 503" in refused(ExitCode.INCOMPLETE, stream=True)


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for stream in (True, False):
        said = refused(ExitCode.INCOMPLETE, stream=stream)
        assert "http://127.0.0.1:9 does not respond" in said and "check the network" in said


def test_the_command_in_a_process_of_its_own(
    hub: HubServer, llama: dict[str, bytes], home: Path, tmp_path: Path
) -> None:
    repo = hub.add(REPO, llama, gated=True)
    repo.commit(llama, ref="v1")
    hub.tokens["hf_mine"] = {REPO}
    hub.fail("", host="cdn", cut=1_000, times=2)
    command = [sys.executable, "-m", "loftq_cli", "quantize", f"{REPO}@v1", "--stream", "--bits", "2", "--iters", "1"]
    environ = {**os.environ, **environment(hub, home), "HF_TOKEN": "hf_mine"}
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    values = json.loads(done.stdout)
    assert values["source"] == REPO and values["source_revision"] == repo.refs["v1"]
    assert "hf_mine" not in done.stdout and weight_files(home) == []
    assert {entry.authorization for entry in hub.requests(host="cdn")} == {None}
    assert (tmp_path / "Tiny-Llama-loftq-2bit-r16" / "config.json").is_file()


@pytest.mark.parametrize("when", ["headers", "weights"])
def test_ctrl_c_does_not_wait_for_the_hub(
    when: str, hub: HubServer, llama: dict[str, bytes], home: Path, tmp_path: Path
) -> None:
    """The thread that reads sleeps for minutes when the Hub asks it to."""
    hub.add(REPO, llama)
    begin = "bytes=0-" if when == "headers" else "bytes=[1-9][0-9]{5}"
    hub.fail("", host="cdn", range=begin, status=429, headers={"Retry-After": "500"}, times=1_000)
    command = [sys.executable, "-m", "loftq_cli", "quantize", REPO, "--stream", "-o", str(tmp_path / "out"), "-q"]
    environ = {**os.environ, **environment(hub, home), "HF_HUB_OFFLINE": "0"}
    restore = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command[1:3] = ["-c", f"{restore}sys.argv[0] = 'loftq'; from loftq_cli.cli import main; main()"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        waiting = time.monotonic() + 120
        while not any(failure.times < 1_000 for failure in hub.failures) and time.monotonic() < waiting:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED and "interrupted; finished matrices are kept" in said, said
    assert not (tmp_path / "out" / "config.json").exists()


def test_hostile_pickles_are_not_run_when_streamed(hub: HubServer, llama: dict[str, bytes], tmp_path: Path) -> None:
    import random

    from support.fuzz_pickles import hostile_pickle
    from support.fuzzing.damage import damage_bytes

    mark, rng = tmp_path / "harm done", random.Random(1)
    for _ in range(60):
        hub.add(
            REPO, {"config.json": llama["config.json"], "pytorch_model.bin": hostile_pickle(rng, mark, damage_bytes)}
        )
        assert f"{REPO}/pytorch_model.bin" in refused(stream=True) and not mark.exists()


@pytest.mark.parametrize("stream", [False, True])
def test_each_worker_reads_the_hub_itself(stream: bool, hub: HubServer, llama, tmp_path: Path) -> None:
    hub.add(REPO, llama)
    alone = loftq_cli.quantize(REPO, output=tmp_path / "alone", stream=stream, **QUICK)
    shared = loftq_cli.quantize(REPO, output=tmp_path / "shared", stream=stream, num_processes=2, **QUICK)
    assert shared.fingerprint == alone.fingerprint and shared.source_revision == alone.source_revision
    for name in WEIGHTS:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    assert loftq_cli.verify(tmp_path / "shared", source=REPO, stream=stream).ok


@pytest.mark.parametrize("status", [200, 403])
def test_answers_that_are_held_in_memory_are_bounded(
    status: int, hub: HubServer, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of files and error pages; files are written to the disk as they come."""
    from loftq_cli.hub import answers

    hub.add(REPO, llama)
    monkeypatch.setattr(answers, "LARGEST", 1 << 20)
    hub.fail("/api/models", status=status, body=b" " * (1 << 21), times=9)
    assert "answers with more than 1 MB" in refused()
    assert len(hub.requests("/api/models")) == 1
    hub.failures.clear()
    hub.fail("/api/models", status=status, body=b"x", headers={"Content-Encoding": "br"}, times=9)
    assert "packs its answers as 'br'" in refused()
    hub.failures.clear()
    assert loftq_cli.plan(REPO, **QUICK).matrices


def test_an_answer_that_hardly_moves_is_given_up(
    hub: HubServer, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.hub import answers

    hub.add(REPO, llama)
    monkeypatch.setattr(answers, "_SLOW", -1.0)
    monkeypatch.setattr(answers, "_SLOWEST", 1 << 60)
    assert "slower than" in refused(ExitCode.INCOMPLETE)
    assert len(hub.requests("/api/models")) == retry.OPENING_ATTEMPTS


@pytest.mark.parametrize("stream", [False, True])
def test_files_of_the_repository_that_stay_behind_are_listed(
    stream: bool, hub: HubServer, llama: dict[str, bytes]
) -> None:
    """Most of them are never fetched, so that the snapshot's folder does not show them."""
    hub.add(REPO, llama)
    notes = [note for note in loftq_cli.plan(REPO, stream=stream, **QUICK).notes if note.startswith("not copied")]
    assert len(notes) == 1 and "consolidated.safetensors, flax_model.msgpack, image.png" in notes[0]
    assert "1_Pooling" not in notes[0] and "tokenizer_config" not in notes[0]


def test_a_pickle_in_the_old_format_larger_than_the_memory_is_refused(
    hub: HubServer, llama: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from loftq_cli.checkpoint import archives

    content = io.BytesIO()
    torch.save(load(llama["model.safetensors"]), content, _use_new_zipfile_serialization=False)
    hub.add(REPO, {"config.json": llama["config.json"], "pytorch_model.bin": content.getvalue()})
    monkeypatch.setattr(archives, "available_memory", lambda: 1000)
    assert "in the format before torch 1.6, which is read whole, but only" in refused(stream=True)
