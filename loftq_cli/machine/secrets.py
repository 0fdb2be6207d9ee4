"""Remove access tokens, passwords and signatures of links from text."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}|(hf|api_org)_[A-Za-z0-9]{20,}")  # a whole one also inside a word
_BEARER = re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]{8,}")
_BASIC = re.compile(r"\b((?i:basic))\s+(?=[\w.~+/-]*[A-Z0-9=])[\w.~+/=-]{8,}")  # but not "basic knowledge"
_USER = re.compile(r"(?i)\b(https?:/{1,2})[^\s/?#'\"@]+@")
_SIGNATURE = re.compile(r"(?i)(https?:/{1,2}[^\s?#'\"<>]+)[?#][^\s'\"<>]+")
_PARAMETER = re.compile(
    r"(?i)\b((?:x-amz-|x-goog-)?(?:signature|credential|security-token)|sig|key-pair-id|policy)=[^\s&'\"<>]+"
)
_HINT = re.compile(r"(?i)hf_|api_org_|bearer|basic|http|=")  # every pattern above has one of these
_SHORTEST_TOKEN = 4  # a shorter value would remove ordinary words


def without_secrets(text: str, token: str | None = None) -> str:
    """Return the text without anything that looks like a token, a password in a link or a link's signature.

    Args:
        token: the user's own token, which is removed whatever it looks like.
    """
    if token and len(token) >= _SHORTEST_TOKEN:
        text = text.replace(token, "***")
    if _HINT.search(text) is None:
        return text
    text = _SIGNATURE.sub(r"\1?***", _USER.sub(r"\1***@", text))
    for pattern in (_BEARER, _BASIC):
        text = pattern.sub(r"\1 ***", text)
    return _PARAMETER.sub(r"\1=***", _TOKEN.sub("***", text))
