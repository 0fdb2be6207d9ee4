"""A panic of a Rust library becomes an error, without its message on stderr; other output on stderr is kept."""

from __future__ import annotations

import os

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from loftq_cli.errors import LoftqError
from loftq_cli.forward.text import tokenizer_errors
from loftq_cli.machine.panics import Panic, catch_panics, is_panic


class PanicException(BaseException):
    """Named as the exception of pyo3."""


def test_a_panic_becomes_an_exception(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Panic, match=r"^retry limit$"), catch_panics():
        os.write(2, b"thread '<unnamed>' panicked at src/x.rs\n")
        raise PanicException("retry\nlimit")
    assert capfd.readouterr().err == ""
    assert is_panic(PanicException()) and not is_panic(KeyboardInterrupt())


def test_other_errors_and_output_pass(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), catch_panics():
        os.write(2, b"a warning\n")
        raise KeyboardInterrupt
    assert capfd.readouterr().err == "a warning\n"


def test_a_tokenizer_that_panics_ends_in_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(([a-z ])+)+X"), "isolated")
    said = r"the tokenizer in here cannot tokenize .*correct its tokenizer\.json"
    with pytest.raises(LoftqError, match=said), tokenizer_errors("here"):
        tokenizer.encode("ab cd " * 2_000)
    assert "panicked" not in capfd.readouterr().err
