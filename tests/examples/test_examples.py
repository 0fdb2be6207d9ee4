"""Every file in examples/ runs as a user would run it, on a tiny Llama and for a few steps."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.handmade import two_layer_llama
from support.paths import ROOT

EXAMPLES = ROOT / "examples"
TESTED = {"trainer.py", "trl_sft.py", "merge_and_eval.py", "quickstart.ipynb"}
SENTENCE = "the cat sat on the mat and the dog lay by the door"
SHORT = ("--rank", "8", "--steps", "3", "--length", "16")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("examples") / "llama"
    two_layer_llama().save_pretrained(folder)
    words = dict.fromkeys(["<unk>", "</s>", *SENTENCE.split()])
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(f"{SENTENCE} . " * 12)
    return path


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write to the working directory unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(name: str, *arguments: str | Path) -> None:
    """Run an example in this process, which has torch loaded already."""
    argv, directory = sys.argv, os.getcwd()
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = argv
        assert os.getcwd() == directory


def adapters_differ(trained: Path, converted: Path) -> bool:
    before = load_file(converted / "loftq_init" / "adapter_model.safetensors")
    after = load_file(trained / "adapter_model.safetensors")
    assert before.keys() == after.keys() and len(after) == 28  # 14 matrices
    return not any(torch.equal(before[key], after[key]) for key in after)


def notebook() -> list[dict[str, object]]:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def test_every_example_is_tested_and_short() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == TESTED
    for name in sorted(TESTED):
        path = EXAMPLES / name
        lines = path.read_text(encoding="utf-8").splitlines()
        if name.endswith(".ipynb"):
            lines = [line for cell in notebook() for line in str(cell["source"]).splitlines()]
        assert len(lines) < 60, name


def test_trainer_then_merge_and_eval(llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("trainer.py", "--model", llama, "--text", text, *SHORT)
    output = Path("trainer-output")
    assert adapters_differ(output / "trained", output / "converted")
    # A second run uses the finished conversion and trains again.
    written = (output / "converted" / "config.json").stat().st_mtime_ns
    run("trainer.py", "--model", llama, "--text", text, *SHORT)
    assert (output / "converted" / "config.json").stat().st_mtime_ns == written

    capsys.readouterr()
    run("merge_and_eval.py", "--text", text, "--window", "16", "--max-tokens", "128")
    printed = dict(re.findall(r"^ *([a-z][a-z +]*): ([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    assert len(printed) == 6, printed
    assert printed["merged model"] == printed["trained adapter"]
    assert float(printed["trained adapter"]) < float(printed["start"]), printed
    assert (Path("merged") / "config.json").is_file()


def test_trl_sft(llama: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed (extra 'dev')")
    data = Path("data.jsonl")
    data.write_text("\n".join(json.dumps({"text": f"{SENTENCE} {word}"}) for word in SENTENCE.split()))
    run("trl_sft.py", "--model", llama, "--data", data, *SHORT)
    output = Path("trl-output")
    assert adapters_differ(output / "trained", output / "converted")
    assert (output / "trained" / "tokenizer.json").is_file()


def test_the_notebook_runs_and_stores_no_output(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {"__name__": "__main__"}
    code = [cell for cell in notebook() if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert code[0]["metadata"] == {"tags": ["parameters"]}
    for number, cell in enumerate(code):
        exec(compile(str(cell["source"]), f"cell {number}", "exec"), scope)
        if number == 0:
            assert scope.keys() >= {"MODEL", "OUTPUT", "RANK", "STEPS"}
            scope.update(MODEL=str(llama), RANK=8, STEPS=5)
    losses = scope["losses"]
    assert isinstance(losses, list) and len(losses) == 5 and losses[-1] < losses[0]
    assert "14 matrices" in capsys.readouterr().out
    assert (Path(str(scope["OUTPUT"])) / "merged" / "config.json").is_file()
