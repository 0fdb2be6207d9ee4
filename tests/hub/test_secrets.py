"""Tokens, passwords and signatures of links are removed from messages and from errors with all of their causes."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.errors import LoftqError
from loftq_cli.hub.read_errors import hub_errors
from loftq_cli.hub.retry import HubModel
from loftq_cli.hub.secrets import redact, scrub
from loftq_cli.publishing.errors import push_errors

HIDDEN = {
    "with hf_AbCdEfGhIjKlMnOp in it": "with *** in it",
    "Authorization: Bearer abc.def-ghi123": "Authorization: Bearer ***",
    "for url 'https://x.aws/f?X-Amz-Signature=SECRET&a=b' end": "for url 'https://x.aws/f?***' end",
    "https://user:SECRET@host/f.": "https://***@host/f.",
    "HTTPS://host/f#token=SECRET": "HTTPS://host/f?***",
    "GET /f?X-Amz-Credential=SECRET&b=1": "GET /f?X-Amz-Credential=***&b=1",
    "/f?Expires=1&Signature=SECRET": "/f?Expires=1&Signature=***",
    "https://host/path, and nothing else": "https://host/path, and nothing else",
}


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_are_removed(text: str) -> None:
    assert redact(text) == HIDDEN[text]


def test_the_users_own_token_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-an-unusual-kind")
    assert redact("sent of-an-unusual-kind to it") == "sent *** to it"


@pytest.mark.parametrize("damage", ["folder", "bytes", "below a file"])
def test_a_token_file_that_cannot_be_read_changes_no_message(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may belong to another user; before, every message ended in a traceback."""
    path = tmp_path / "token"
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    place = path / "token" if damage == "below a file" else path
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place))
    assert redact("model.safetensors has 3 bytes") == "model.safetensors has 3 bytes"


def test_causes_attributes_and_notes_are_scrubbed() -> None:
    link = "https://host/f?Signature=SECRET"
    try:
        try:
            raise OSError(5, f"no {link}")
        except OSError as cause:
            error = RuntimeError(f"failed {link}")
            error.server_message = link  # type: ignore[attr-defined]
            error.add_note(link) if hasattr(error, "add_note") else None
            raise error from cause
    except RuntimeError as caught:
        scrub(caught)
        assert "SECRET" not in "".join(traceback.format_exception(caught)) + str(vars(caught))


@pytest.mark.parametrize("context", [lambda: push_errors("org/name"), lambda: hub_errors(HubModel("org/name"))])
@pytest.mark.parametrize("kind", [RuntimeError, KeyError, LoftqError, KeyboardInterrupt])
def test_every_error_of_a_request_is_scrubbed(context: Any, kind: type[BaseException]) -> None:
    link = "https://host/f?Signature=SECRET"
    with pytest.raises(kind) as caught, context():
        raise kind(link) from OSError(5, ConnectionError(f"inside {link}"))
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
