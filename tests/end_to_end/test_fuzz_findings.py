"""Values of the kinds that `fuzz.py` found, each as a command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import loftq, sentence

from loftq_cli.engine.workers.session import Session
from loftq_cli.errors import LoftqError
from loftq_cli.machine.confined import real_path, user_path

FLAGS = ("--bits", "2", "--rank", "2", "--iters", "1", "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def converted(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    loftq("quantize", random_llama, "-o", out, *FLAGS)
    return out


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    path = tmp_path / "loop"
    path.symlink_to("loop")
    return path


def test_a_link_to_itself_beside_the_weights_is_named(random_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(random_llama, source)
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to("generation_config.json")
    for words in (("plan", source), ("quantize", source, *FLAGS)):
        result = loftq(*words, "-o", tmp_path / "out", code=1)
        assert "generation_config.json is a link" in sentence(result) or "broken link" in sentence(result)


COMMANDS: dict[str, tuple[Callable[[Path, Path, Path], tuple[object, ...]], int]] = {
    "quantize": (lambda path, model, out: ("quantize", path, "-o", out, *FLAGS), 1),
    "quantize into": (lambda path, model, out: ("quantize", model, "-o", path, *FLAGS), 1),
    "plan": (lambda path, model, out: ("plan", path, "-o", out), 1),
    "inspect": (lambda path, model, out: ("inspect", path), 1),
    "verify": (lambda path, model, out: ("verify", path), 1),
    "push": (lambda path, model, out: ("push", path, "a/b", "--dry-run"), 1),
    "merge": (lambda path, model, out: ("merge", path, path, "-o", out), 1),
    "batch": (lambda path, model, out: ("batch", path, "-o", out, "--dry-run"), 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_that_are_links_to_themselves(command: str, loop: Path, random_llama: Path, tmp_path: Path) -> None:
    words, code = COMMANDS[command]
    result = loftq(*words(loop, random_llama, tmp_path / "out"), code=code)
    assert "unexpected" not in result.output and "loop" in result.output


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "quantize into"])
def test_paths_in_the_home_of_nobody(command: str, random_llama: Path, tmp_path: Path) -> None:
    words, code = COMMANDS[command]
    result = loftq(*words(Path("~no-such-user/model"), random_llama, tmp_path / "out"), code=code)
    assert "unexpected" not in result.output and "~no-such-user" in result.output


def test_paths_are_made_absolute_as_far_as_they_exist(loop: Path, tmp_path: Path) -> None:
    assert real_path(loop / "x") == loop / "x" and user_path("~no-such-user/x") == Path("~no-such-user/x")
    (tmp_path / "link").symlink_to(tmp_path)
    assert real_path(tmp_path / "link" / "a") == tmp_path / "a" and user_path("~") == Path.home()


@pytest.mark.parametrize("value", [float("nan"), 3, "LlamaForCausalLM", {"a": 1}, [], [None]])
def test_merge_of_a_backbone_with_odd_architectures(value: object, converted: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(converted, backbone)
    config = json.loads((backbone / "config.json").read_bytes())
    (backbone / "config.json").write_text(json.dumps(config | {"architectures": value}))
    result = loftq("merge", backbone, backbone / "loftq_init", "-o", tmp_path / "out")
    assert result.stderr == "" and (tmp_path / "out" / "config.json").is_file()


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a file of a terabyte": lambda path: (path.write_bytes(b"{}"), os.truncate(path, 1 << 40)),
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
READERS: dict[str, Callable[[Path, Path, Path], tuple[object, ...]]] = {
    "inspect": lambda path, model, out: ("inspect", path),
    "push": lambda path, model, out: ("push", path, "a/b", "--dry-run"),
    "merge": lambda path, model, out: ("merge", path, path / "loftq_init", "-o", out),
    "overwrite": lambda path, model, out: ("quantize", model, "-o", path, *FLAGS, "--overwrite"),
    "eval": lambda path, model, out: ("eval", path, "--text", path / "README.md"),
}


@pytest.mark.parametrize("odd", ODD_FILES)
def test_manifests_that_are_no_file_of_a_manifests_size(
    odd: str, converted: Path, random_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "converted"
    shutil.copytree(converted, folder)
    (folder / "loftq.json").unlink()
    ODD_FILES[odd](folder / "loftq.json")
    for words in READERS.values():
        said = sentence(loftq(*words(folder, random_llama, tmp_path / "out"), code=1))
        assert "loftq.json" in said and "unexpected" not in said
    result = loftq("verify", folder, code=3)
    assert "loftq.json" in result.stdout and "unexpected" not in result.output


@pytest.mark.parametrize("odd", ODD_FILES)
def test_journals_that_are_no_file_of_a_journals_size(odd: str, random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".loftq").mkdir(parents=True)
    ODD_FILES[odd](tmp_path / "out" / ".loftq" / "journal")
    said = sentence(loftq("quantize", random_llama, "-o", tmp_path / "out", *FLAGS, code=1))
    assert "journal" in said and "unexpected" not in said


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize("name", ["units", "status.1"])
def test_work_lists_and_statuses_that_are_no_small_files(name: str, odd: str, tmp_path: Path) -> None:
    session = Session(tmp_path, "a")
    session.path.mkdir(parents=True)
    ODD_FILES[odd](session.path / name)
    with pytest.raises(LoftqError, match=name):
        session.work_list() if name == "units" else session.statuses()
