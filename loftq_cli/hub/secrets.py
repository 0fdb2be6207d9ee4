"""Remove tokens and signatures of links from messages, and from the errors whose tracebacks `--debug` prints."""

from __future__ import annotations

import re

from huggingface_hub import get_token

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
_USER = re.compile(r"(?i)\b(https?://)[^\s/?#'\"@]+@")
_SIGNATURE = re.compile(r"(?i)(https?://[^\s?#'\"<>]+)[?#][^\s'\"<>]+")
_PARAMETER = re.compile(
    r"(?i)\b((?:x-amz-|x-goog-)?(?:signature|credential|security-token)|sig|key-pair-id|policy)=[^\s&'\"<>]+"
)


def redact(text: str) -> str:
    """Return the text without the user's token, anything that looks like one, passwords and signatures of links."""
    token = get_token()
    text = text.replace(token, "***") if token else text
    text = _SIGNATURE.sub(r"\1?***", _USER.sub(r"\1***@", text))
    return _PARAMETER.sub(r"\1=***", _BEARER.sub(r"\1 ***", _TOKEN.sub("***", text)))


def scrub(error: BaseException) -> None:
    """Redact an error and all of its causes in place."""
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(redact(item) if isinstance(item, str) else item for item in one.args)
        for name, value in list(getattr(one, "__dict__", {}).items()):
            if isinstance(value, str):
                setattr(one, name, redact(value))
        if isinstance(one, OSError):  # which prints these, not its arguments
            for name in ("strerror", "filename", "filename2"):
                if isinstance(value := getattr(one, name, None), str):
                    setattr(one, name, redact(value))
        if notes := getattr(one, "__notes__", None):
            one.__notes__ = [redact(str(note)) for note in notes]
        rest += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
