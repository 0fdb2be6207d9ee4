"""Push with the real huggingface_hub client to a Hub on loopback, and check the files pulled back from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.testing
import yaml
from support.hub_server import talking_to
from support.hub_write_server import PART, WriteHub

import loftq_cli
import loftq_cli.runtime
from loftq_cli.cli import app
from loftq_cli.errors import ExitCode, LoftqError, UsageError

REPO = "some-org/Tiny-2bit"
TOKEN = "hf_good"
CARD = "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\n---\n# Tiny\n"
runner = typer.testing.CliRunner()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteHub]:
    """A Hub that this process's huggingface_hub talks to; alice is logged in."""
    from huggingface_hub.utils import _http

    with WriteHub() as server, talking_to(server, tmp_path / "home", monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="module")
def source(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a licensed card."""
    path = tmp_path_factory.mktemp("secret-place") / "Tiny"
    shutil.copytree(random_llama, path)
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in several shards; tests that change it copy it."""
    path = tmp_path_factory.mktemp("secret-place") / "out"
    loftq_cli.quantize(source, output=path, bits=2, rank=4, iters=1, max_shard_size="30KB", device="cpu")
    return path


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".loftq" not in path.parts)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pull(repo: str = REPO, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision))


def check_pulled(folder: Path) -> None:
    """Check that the pulled files are complete and verify."""
    verification = loftq_cli.verify(folder)
    assert verification.ok and verification.files > 5, verification.problems


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 17, 3, 41, 8]])).logits


def refused(directory: Path, code: ExitCode = ExitCode.FAILED, repo: str = REPO, **how: object) -> str:
    with pytest.raises(LoftqError) as caught:
        loftq_cli.push(directory, repo, **how)
    said = str(caught.value)
    assert "\n" not in said and TOKEN not in said and caught.value.exit_code == code, said
    return said


def test_a_pushed_model_comes_back_and_verifies(hub: WriteHub, finished: Path, source: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = hashes(finished)
    pushed = loftq_cli.push(finished, REPO, message="First\n\nwith words", base_model="org/Tiny")
    assert hashes(finished) == before and not (finished / ".loftq").exists()
    assert pushed.url == f"{hub.url}/{REPO}" and pushed.commit == hub.repos[REPO].refs["main"]
    assert hub.of(REPO).messages == [("main", "First")] and not hub.repos[REPO].private

    pulled = pull()
    check_pulled(pulled)
    checked = loftq_cli.verify(pulled, source=source)
    assert checked.ok and checked.matrices == 14, checked.problems
    assert set(hub.files(REPO)) - {".gitattributes"} == set(before)
    changed = {name for name in before if hashes(pulled)[name] != before[name]}
    assert changed == {"README.md", "loftq.json", "loftq.yaml", "loftq_init/adapter_config.json"}
    for name, content in hub.files(REPO).items():
        assert b"secret-place" not in content and str(source).encode() not in content, name

    backbone = AutoModelForCausalLM.from_pretrained(REPO)
    model = PeftModel.from_pretrained(backbone, REPO, subfolder="loftq_init").eval()
    assert model.peft_config["default"].base_model_name_or_path == REPO
    expected = logits(loftq_cli.load(finished).eval())
    assert torch.equal(logits(model), expected) and torch.equal(logits(loftq_cli.load(REPO).eval()), expected)


def test_the_card_on_the_hub(hub: WriteHub, finished: Path) -> None:
    loftq_cli.push(finished, REPO, base_model="org/Tiny")
    card = hub.files(REPO)["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    tags = yaml.safe_load(front)
    assert tags["base_model"] == "org/Tiny" and tags["base_model_relation"] == "quantized" and "loftq" in tags["tags"]
    assert (tags["license"], tags["license_name"], tags["license_link"]) == ("other", "tiny-1", "LICENSE")
    assert body.lstrip().startswith("# Tiny-2bit\n")
    assert f'path = "{REPO}"' in body and f'loftq_cli.load("{REPO}", trainable=True)' in body
    assert "loftq quantize org/Tiny -o Tiny-2bit --bits 2" in body
    assert yaml.safe_load(hub.files(REPO)["loftq.yaml"])["model"] == "org/Tiny"
    manifest = json.loads(hub.files(REPO)["loftq.json"])
    assert manifest["output"] == REPO and manifest["source"] == manifest["recipe"]["model"] == "org/Tiny"


@pytest.mark.parametrize(
    "how", [{"bits": 2}, {"bits": 4}, {"bits": 3, "format": "dense"}], ids=["packed", "bnb", "dense"]
)
@pytest.mark.parametrize("revision", [None, "two-bits"])
def test_the_cards_snippet_loads_what_was_pushed(
    hub: WriteHub, source: Path, tmp_path: Path, how: dict[str, object], revision: str | None
) -> None:
    loftq_cli.quantize(source, output=tmp_path / "o", rank=4, iters=1, device="cpu", **how)
    pushed = loftq_cli.push(tmp_path / "o", REPO, revision=revision)
    assert pushed.url.endswith(f"{REPO}/tree/two-bits" if revision else REPO)
    card = hub.files(REPO, revision or "main")["README.md"].decode()
    assert "base_model" not in card.split("---")[1]
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, torch.nn.Module] = {}
    exec(snippet, names)
    expected = logits(loftq_cli.load(tmp_path / "o").eval())
    assert torch.equal(logits(names["model"].eval()), expected)
    (call,) = re.findall(r"`(loftq_cli\.load\(.*?\))`", card)
    assert torch.equal(logits(eval(call, {"loftq_cli": loftq_cli}).eval()), expected)
    if revision:
        assert set(hub.files(REPO, "main")) == {".gitattributes"}
        check_pulled(pull(revision=revision))


def test_of_a_launchers_processes_one_pushes(hub: WriteHub, finished: Path, source: Path) -> None:
    """Nothing is left to convert, and nobody waits for a run that will not come."""
    recipe = ["--bits", "2", "--rank", "4", "--iters", "1", "--max-shard-size", "30KB", "--device", "cpu"]
    words = ["-m", "loftq_cli", "quantize", str(source), "-o", str(finished), *recipe, "--push-to", REPO]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port=0",
    ]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"pushed to {REPO}") == 1 and len(hub.requests("/repos/create")) == 1
    check_pulled(pull())


def test_a_second_push_sends_nothing(hub: WriteHub, finished: Path) -> None:
    first = loftq_cli.push(finished, REPO)
    hub.log.clear()
    second = loftq_cli.push(finished, REPO)
    assert first.commit == second.commit and len(hub.of(REPO).messages) == 1
    assert not hub.requests(host="cdn") and not hub.requests("/commit/")


def test_an_upload_cut_in_the_middle_goes_on_by_itself(hub: WriteHub, finished: Path) -> None:
    hub.sever("/upload/", method="PUT", after=10_000)
    loftq_cli.push(finished, REPO)
    assert not any(cut.times for cut in hub.severed) and len(hub.of(REPO).messages) == 1
    check_pulled(pull())


def test_an_upload_cut_again_and_again_goes_on_with_the_same_command(hub: WriteHub, finished: Path) -> None:
    large = hashlib.sha256((finished / "loftq_init/adapter_model.safetensors").read_bytes()).hexdigest()
    hub.sever(f"/upload/{large}", method="PUT", after=10_000, times=10**6)
    said = refused(finished, ExitCode.INCOMPLETE)
    assert "does not answer" in said and "run the same command again to go on" in said and "127.0.0.1" in said
    there = list(hub.received)
    assert there and large not in there and set(hub.files(REPO)) == {".gitattributes"}
    hub.severed.clear()
    loftq_cli.push(finished, REPO)
    assert len(hub.received) == len(set(hub.received)) and hub.received[: len(there)] == there
    check_pulled(pull())


def test_large_files_go_in_parts(hub: WriteHub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.hub_write_server.PART", 10_000)
    hub.sever("/upload/.*/2$", method="PUT", after=100)
    loftq_cli.push(finished, REPO)
    assert hub.requests("/complete") and PART > 10_000
    check_pulled(pull())


def test_a_commit_cut_in_the_middle_is_made_once(hub: WriteHub, finished: Path) -> None:
    hub.sever("/commit/", method="POST", after=2_000)
    loftq_cli.push(finished, REPO)
    assert len(hub.requests("/commit/")) == 2 and len(hub.of(REPO).messages) == 1
    check_pulled(pull())


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: WriteHub, finished: Path) -> None:
    hub.fail("/commit/", method="POST", cut=5)
    pushed = loftq_cli.push(finished, REPO)
    assert len(hub.of(REPO).messages) == 1 and pushed.commit == hub.repos[REPO].refs["main"]
    check_pulled(pull())


def test_a_hub_in_trouble_is_waited_for(hub: WriteHub, finished: Path) -> None:
    for path, status in (("/repos/create", 500), ("/preupload/", 429), ("objects/batch", 503), ("/commit/", 500)):
        hub.fail(path, method="POST", status=status, headers={"Retry-After": "0"})
    loftq_cli.push(finished, REPO)
    assert not any(failure.times for failure in hub.failures)
    check_pulled(pull())


def test_a_pull_request_is_opened_once(hub: WriteHub, out: Path) -> None:
    hub.users["hf_other"] = type(hub.users[TOKEN])("bob", frozenset({"bob"}))
    hub.add("bobs/model", {"README.md": b"# bob's\n"})
    hub.tokens[TOKEN].add("bobs/model")
    hub.sever("/commit/refs/pr/1", method="POST", after=1, times=10**6)
    refused(out, ExitCode.INCOMPLETE, "bobs/model", create_pr=True)
    hub.severed.clear()
    again = loftq_cli.push(out, "bobs/model", create_pr=True)
    requests = hub.of("bobs/model").pull_requests
    assert [one.num for one in requests] == [1] and again.pull_request == 1
    assert again.url == f"{hub.url}/bobs/model/discussions/1" and set(hub.files("bobs/model")) == {"README.md"}
    check_pulled(pull("bobs/model", "refs/pr/1"))
    assert 'revision="' not in hub.files("bobs/model", "refs/pr/1")["README.md"].decode()
    assert json.loads((out / ".loftq" / "push.json").read_text()) == {"bobs/model": 1}

    (out / ".loftq" / "push.json").unlink()  # as on another machine
    assert loftq_cli.push(out, "bobs/model", create_pr=True).pull_request == 1
    requests[0].status = "merged"
    assert loftq_cli.push(out, "bobs/model", create_pr=True).pull_request == 2
    assert ".loftq/push.json" not in hub.files("bobs/model", "refs/pr/2")


def test_a_pull_request_whose_number_got_lost_is_found_again(hub: WriteHub, out: Path) -> None:
    hub.add("some-org/model", {"README.md": b"# old\n"})
    hub.fail("/discussions$", method="POST", cut=0)
    assert loftq_cli.push(out, "some-org/model", create_pr=True).pull_request == 1
    assert len(hub.of("some-org/model").pull_requests) == 1


def test_a_private_repository_is_private(hub: WriteHub, finished: Path) -> None:
    loftq_cli.push(finished, REPO, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    assert "is public" in refused(finished, private=True)


def test_only_a_complete_conversion_is_pushed(hub: WriteHub, out: Path, source: Path, tmp_path: Path) -> None:
    (out / "notes.txt").write_text("mine")
    assert loftq_cli.push(out, REPO).left_out == ("notes.txt",) and "notes.txt" not in hub.files(REPO)
    hub.log.clear()
    shard = next(out.glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert shard.name in refused(out, ExitCode.VERIFICATION_FAILED)
    shard.unlink()
    assert shard.name in refused(out, ExitCode.VERIFICATION_FAILED)
    manifest = (out / "loftq.json").read_bytes()
    (out / "loftq.json").write_bytes(manifest.replace(b'"device": "cpu"', b'"device": "gpu"'))
    assert "loftq.json" in refused(out, ExitCode.VERIFICATION_FAILED)
    (out / "loftq.json").unlink()
    (out / ".loftq").mkdir(exist_ok=True)
    assert "not finished" in refused(out, ExitCode.INCOMPLETE)
    assert "no directory" in refused(tmp_path / "nowhere")
    assert not hub.log


@pytest.mark.parametrize(
    ("path", "status", "code", "said"),
    [
        ("/repos/create", 401, 1, "does not accept the token"),
        ("/preupload/", 403, 1, "may not write to"),
        ("/preupload/", 404, 1, "has no some-org/Tiny-2bit that this token can see"),
        ("/commit/", 409, 4, "changed by somebody else"),
        ("/commit/", 412, 4, "changed by somebody else"),
        ("/commit/", 429, 4, "HTTP status 429"),
        ("objects/batch", 500, 4, "HTTP status 500"),
        ("/commit/", 503, 4, "run the same command again to go on"),
        ("/commit/", 422, 1, "refuses the push"),
    ],
)
def test_refusals_are_one_sentence(hub: WriteHub, finished: Path, path: str, status: int, code: int, said: str) -> None:
    message = {401: "Invalid credentials in Authorization header"}.get(status, "quota of hf_abcdefghijkl is full")
    hub.fail(path, method="POST", status=status, headers={"X-Error-Message": message}, times=10**6)
    sentence = refused(finished, ExitCode(code))
    assert said in sentence and "hf_abc" not in sentence


def test_who_may_not_push(hub: WriteHub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("others/model", {"README.md": b""})
    assert "may not write to others/model" in refused(finished, repo="others/model")
    assert "may not write to others/new" in refused(finished, repo="others/new")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept the token" in refused(finished)
    monkeypatch.delenv("HF_TOKEN")
    hub.log.clear()
    assert "nobody is logged in" in refused(finished)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(finished) and not hub.log


def test_a_hub_that_is_not_there(hub: WriteHub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in refused(finished, ExitCode.INCOMPLETE)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, 1, "does not accept the token"),
        (403, 1, "may not write"),
        (404, 1, "has no some-org/Tiny-2bit that this token can see"),
        (503, 4, "does not answer"),
    ],
)
def test_what_hf_xet_runs_into(
    hub: WriteHub, finished: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: int, said: str
) -> None:
    """The client that uploads large files to the real Hub has errors of its own."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet", reason="huggingface_hub comes without hf_xet on this platform")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    hub.fail("/xet-write-token/", status=status, times=10**6)
    assert said in refused(finished, ExitCode(code)) and hub.requests("/xet-write-token/")


@pytest.mark.parametrize(
    ("repo", "how", "said"),
    [
        ("name", {}, "write ORG/NAME"),
        ("a/b/c", {}, "write ORG/NAME"),
        ("a/b c", {}, "write ORG/NAME"),
        (REPO, {"base_model": "x"}, "write ORG/NAME"),
        (REPO, {"create_pr": True, "revision": "b"}, "leave --revision out"),
        (REPO, {"message": " "}, "--message"),
        (REPO, {"revision": "a b"}, "--revision"),
    ],
)
def test_invalid_arguments(hub: WriteHub, finished: Path, repo: str, how: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        loftq_cli.push(finished, repo, **how)
    assert not hub.log


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
@pytest.mark.parametrize("path", ["/repos/create", "/preupload/", "objects/batch", "/upload/", "/commit/", "whoami"])
def test_no_token_is_ever_shown(
    hub: WriteHub, out: Path, path: str, debug: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Even if a careless proxy sends the Authorization header back."""
    caplog.set_level(logging.INFO)  # below it lies the wire itself, which httpcore shows to those who ask for it
    for name in ("loftq_cli", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, name)
    message = {"X-Error-Message": f"denied: Bearer {TOKEN}", "X-Request-Id": "7"}
    where = (
        {"host": "cdn", "method": "PUT"} if path == "/upload/" else {"method": "GET" if path == "whoami" else "POST"}
    )
    hub.fail(path, status=403, headers=message, times=10**6, **where)
    result = runner.invoke(app, ["push", str(out), REPO, "--create-pr", *debug])
    shown = result.output + result.stderr
    assert ("Traceback" in result.stderr and "LoftqError" in result.stderr) == bool(debug)
    assert result.exit_code == 1 and TOKEN not in shown + caplog.text and "Signature=secret" not in shown, shown
    assert all(TOKEN not in path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())


def test_the_token_stays_with_the_hub_and_out_of_the_files(hub: WriteHub, finished: Path) -> None:
    loftq_cli.push(finished, REPO)
    assert all(TOKEN.encode() not in content for content in hub.files(REPO).values())
    assert all(request.authorization is None for request in hub.requests(host="cdn"))
    assert {request.authorization for request in hub.requests(host="hub")} == {f"Bearer {TOKEN}"}


def test_a_dry_run_sends_no_request(hub: WriteHub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = runner.invoke(app, ["push", str(finished), REPO, "--dry-run"])
    assert result.exit_code == 0 and "would be pushed to" in result.stdout and "model-00001-of" in result.stdout
    values = json.loads(runner.invoke(app, ["push", str(finished), REPO, "--dry-run", "--json"]).stdout)
    assert values["dry_run"] and values["commit"] is None and not hub.log
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loftq_cli.push(finished, REPO)
    assert {name: len(content) for name, content in hub.files(REPO).items() if name in values["files"]} == values[
        "files"
    ]


def test_quantize_pushes_too(hub: WriteHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["quantize", str(source), "-o", str(tmp_path / "o"), "--bits", "2", "--rank", "4", "--iters", "1"]
    words += ["--device", "cpu", "--push-to", REPO]
    hub.fail("/commit/", method="POST", status=503, times=10**6)
    result = runner.invoke(app, words)
    assert result.exit_code == 4 and "is finished, but was not pushed" in result.stderr, result.output
    hub.failures.clear()
    before = (tmp_path / "o/loftq.json").stat().st_mtime_ns
    result = runner.invoke(app, words)
    assert result.exit_code == 0 and f"pushed to {REPO}" in result.stdout, result.output
    assert (tmp_path / "o/loftq.json").stat().st_mtime_ns == before
    check_pulled(pull())
    assert "is finished already" in runner.invoke(app, words[:-2]).stderr
    monkeypatch.delenv("HF_TOKEN")
    result = runner.invoke(app, [*words[:2], "-o", str(tmp_path / "new"), "--push-to", REPO])
    assert result.exit_code == 1 and "nobody is logged in" in result.stderr and not (tmp_path / "new").exists()
    result = runner.invoke(app, [*words[:2], "-o", str(tmp_path / "new"), "--push-to", "name"])
    assert result.exit_code == 2 and not (tmp_path / "new").exists()


def resealed(out: Path, name: str, content: bytes) -> None:
    """Replace a file and list it correctly in the manifest, as anybody who ships a directory can."""
    from loftq_cli.artifacts.manifest import render, seal
    from loftq_cli.tensorfile.hashing import FileRecord

    manifest = loftq_cli.read_manifest(out)
    record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    files = {**manifest.files, name: record}
    (out / "loftq.json").write_bytes(seal(render(dataclasses.replace(manifest, files=files))))


@pytest.mark.parametrize("where", ["file", "folder"])
def test_links_out_of_the_directory_are_not_published(where: str, hub: WriteHub, out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere" / "secret.txt"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    if where == "folder":
        (out / "extra").symlink_to(secret.parent)
        resealed(out, "extra/secret.txt", b"secret")
    else:
        (out / "secret.txt").symlink_to(secret)
        resealed(out, "secret.txt", b"secret")
    assert "is a link" in refused(out, dry_run=True)
    assert not hub.log


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", b"---\nlicense: " + b"[" * 20_000 + b"\n---\n"),
        ("README.md", b"\xff\xfe"),
        ("loftq.yaml", b"[" * 20_000),
        ("loftq.yaml", b"- 1\n"),
        ("loftq_init/adapter_config.json", b"[" * 100_000),
        ("loftq_init/adapter_config.json", b"null"),
    ],
)
def test_odd_texts_end_in_a_sentence_that_names_the_file(name: str, content: bytes, hub: WriteHub, out: Path) -> None:
    (out / name).write_bytes(content)
    resealed(out, name, content)
    assert str(out / name) in refused(out, dry_run=True)
