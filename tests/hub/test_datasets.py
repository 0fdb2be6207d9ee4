"""Texts by the name of a dataset on the Hub: the file that is read, the recorded name, the message for wrong names."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.calibration_text import TEXT, llama
from support.hub_server import HubServer

import loftq_cli
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.forward.text import read_text
from loftq_cli.recipe.model import read_yaml

FILES = {
    "README.md": b"about",
    "raw/test-00000.txt": b"of the test",
    "raw/train-00000.txt": b"first of the training",
    "raw/train-00001.txt": b"second of the training",
    "other/all.jsonl": b'{"text": "a record"}\n{"question": "q", "answer": "a"}\n',
    "pictures/train.png": b"",
    "pictures/../../train.txt": b"outside",
}


@pytest.fixture
def corpus(hub: HubServer) -> HubServer:
    hub.add("org/corpus", FILES)
    return hub


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("org/corpus", ("first of the training",)),
        ("org/corpus/raw", ("first of the training",)),
        ("org/corpus/raw/test-00000.txt", ("of the test",)),
        ("org/corpus/other", ("a record", "q\na")),
    ],
)
def test_one_file_of_a_dataset_is_used(corpus: HubServer, name: str, records: tuple[str, ...]) -> None:
    text = read_text(name, "--text")
    assert text.records == records and str(text.path) == name
    assert not corpus.requests("", authorization="Bearer")


def test_local_paths_take_precedence_over_the_hub(
    corpus: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "corpus").mkdir(parents=True)
    (tmp_path / "org" / "corpus" / "a.txt").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert read_text("org/corpus", "--text").records == ("local",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/nothing", r"no such file or directory, and http\S+ has no visible dataset of that name"),
        ("org/corpus/pictures", r"pictures of the dataset org/corpus has no \.txt"),
        ("data/missing.txt", r"no such file or directory\."),
        ("./org/corpus", r"has no visible dataset|no such file or directory\."),
        ("missing", r"no such file or directory\."),
    ],
)
def test_a_wrong_name_is_reported(corpus: HubServer, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_text(name, "--text")


def test_offline_is_reported(corpus: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoftqError, match="HF_HUB_OFFLINE is set"):
        read_text("org/corpus", "--text")


def test_failed_requests_are_retried(corpus: HubServer) -> None:
    corpus.fail("/api/datasets/.*", status=503, times=2)
    assert read_text("org/corpus", "--text").records == ("first of the training",)
    corpus.fail("/datasets/org/corpus/resolve/.*", status=500, times=99)
    with pytest.raises(LoftqError, match=r"refuses the download|does not respond"):
        read_text("org/corpus/raw/train-00001.txt", "--text")


def test_the_recipe_names_the_dataset(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub.add("org/corpus", {"train.txt": TEXT.encode()})
    asked = {"bits": 2, "rank": 4, "calibration_tokens": 64}
    loftq_cli.quantize(llama(tmp_path / "m"), output=tmp_path / "a", calibrate="org/corpus", **asked)
    recipe = read_yaml(tmp_path / "a" / "loftq.yaml")
    assert recipe["calibrate"] == "org/corpus" and len(recipe["calibration_hash"]) == 64
    loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "b")
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    hub.add("org/corpus", {"train.txt": b"another " + TEXT.encode()})
    with pytest.raises(LoftqError, match="is not what this recipe was calibrated on"):
        loftq_cli.quantize(config=tmp_path / "a" / "loftq.yaml", output=tmp_path / "c")
