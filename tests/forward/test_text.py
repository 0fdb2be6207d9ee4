"""Opening a tokenizer that a checkpoint brings along."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from loftq_cli.errors import LoftqError
from loftq_cli.forward.text import Text, make_windows, open_tokenizer


def test_nobody_is_asked_to_run_a_tokenizers_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "harm done"
    code = f"open({str(mark)!r}, 'w')\nclass Evil: ...\n"
    (tmp_path / "evil.py").write_text(code)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    with pytest.raises(LoftqError, match="no tokenizer that transformers can load"):
        open_tokenizer(tmp_path)
    assert not asked and not mark.exists()


@pytest.mark.parametrize("limit", ["512", [512], float("nan"), float("inf"), True, -1])
def test_a_limit_that_is_no_number_of_tokens_is_named(limit: object) -> None:
    tokenizer = SimpleNamespace(model_max_length=limit, name_or_path="some-model")
    text = Text(Path("t.txt"), "0" * 64, ("words",))
    with pytest.raises(LoftqError, match=r"tokenizer_config.json in some-model has model_max_length .*: correct it"):
        make_windows(text, tokenizer, positions=64, max_tokens=None, window=None)  # type: ignore[arg-type]
