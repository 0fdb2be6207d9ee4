"""No command runs code that a model brings along, or asks whether to."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loftq_cli
from loftq_cli.cli import app

PACKAGE = Path(loftq_cli.__file__).parent
EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]}


def test_from_pretrained_is_called_in_one_place() -> None:
    """PEFT's own classes, which know no remote code, are the exception."""
    calls = {
        (path.relative_to(PACKAGE).as_posix(), call)
        for path in PACKAGE.rglob("*.py")
        for call in re.findall(r"^[^\"'`#\n]*?([\w.]+)\.from_pretrained\(", path.read_text(), re.MULTILINE)
    }
    assert calls == {
        ("machine/pretrained.py", "loader"),
        ("runtime/adapter.py", "LoraConfig"),
        ("runtime/adapter.py", "PeftModel"),
    }


def plant(folder: Path, mark: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...\n")
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text()) if path.exists() else {"tokenizer_class": "Evil"}
        path.write_text(json.dumps(settings | {"auto_map": EVIL}))


def test_no_command_runs_or_asks(random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    mark, ran = tmp_path / "harm done", []
    for name in ("get_class_from_dynamic_module", "get_class_in_module"):
        monkeypatch.setattr(dynamic, name, lambda *args, _name=name, **kwargs: ran.append(_name))
    monkeypatch.setattr("builtins.input", lambda prompt="": ran.append(prompt) or "y")
    model, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "text.txt"
    shutil.copytree(random_llama, model)
    plant(model, mark)
    text.write_text("some words to read " * 200)
    common = ["--bits", "4", "--rank", "4", "--iters", "1", "--device", "cpu", "--format", "packed"]

    def run(*words: object) -> None:
        result = CliRunner().invoke(app, [str(word) for word in words], input="y\n" * 20)
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        assert not ran and not mark.exists() and "[y/N]" not in result.output, words

    run("plan", model, *common)
    run("quantize", model, "-o", tmp_path / "calibrated", *common, "--calibrate", text)
    run("quantize", model, "-o", out, *common)
    assert (out / "loftq.json").exists() and (out / "evil.py").exists(), "copied, never run"
    for words in (("verify", out), ("verify", out, "--source"), ("inspect", out), ("eval", out, "--text", text)):
        run(*words)
    run("merge", out, out / "loftq_init", "-o", tmp_path / "merged")
    run("push", out, "org/name", "--dry-run")
