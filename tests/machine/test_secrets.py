"""Tokens, passwords and signatures of links are removed from text."""

from __future__ import annotations

import pytest

from loftq_cli.machine.secrets import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_abcdefgh12345678 ended", "token *** ended"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("https://cdn.x/f?X-Amz-Signature=ab&c=d, x", "https://cdn.x/f?*** x"),
        ("https://me:secret@host/f", "https://***@host/f"),
        (f"model.weighthf_{'aB3' * 8}", "model.weight***"),
        ("hf_short and https://host/f", "hf_short and https://host/f"),
    ],
)
def test_secrets_are_removed(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Basic dXNlcjpzZWNyZXQ=", "Authorization: Basic ***"),
        ("basic quantization of Basic knowledge", "basic quantization of Basic knowledge"),
        ("GET /f?X-Amz-Signature=SECRET&b=1", "GET /f?X-Amz-Signature=***&b=1"),
        ("https:/me:SECRET@host/f?sig=SECRET as a path", "https:/***@host/f?*** as a path"),
        ("https://host/f#access=SECRET", "https://host/f?***"),
    ],
)
def test_each_kind_of_secret_is_removed_and_ordinary_words_stay(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_the_token_passed_in_is_removed_whatever_it_looks_like() -> None:
    assert without_secrets("sent my-own-token on", "my-own-token") == "sent *** on"
    assert without_secrets("a b c", "b") == "a b c"
