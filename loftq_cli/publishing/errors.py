"""Turn failures of a push into one sentence each, without tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.hub.answers import CutShort
from loftq_cli.hub.retry import is_transient, reason
from loftq_cli.hub.secrets import redact, scrub, scrubbed_errors

_XET_REFUSAL = re.compile(r"HTTP status client error \((\d{3})")
_CONFLICTS = frozenset({409, 412})


@contextmanager
def push_errors(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into one sentence with the next step; no token appears in it or its causes."""
    with scrubbed_errors():
        try:
            yield
        except (HTTPError, CutShort, OfflineModeIsEnabled, OSError, ValueError) as error:
            scrub(error)  # before its text becomes part of the sentence
            raise _sentence(error, repo) from error


def nobody_logged_in() -> LoftqError:
    """Return the error for a missing token."""
    endpoint = HfApi().endpoint
    return LoftqError(
        f"nobody is logged in to {endpoint}: create a token with write access at {endpoint}/settings/tokens, then run "
        "`hf auth login` or set HF_TOKEN."
    )


def offline() -> LoftqError:
    """Return the error for HF_HUB_OFFLINE."""
    return LoftqError(
        "pushing needs the Hub, but HF_HUB_OFFLINE is set: unset it, then run the same command again to go on."
    )


def network_cause(error: BaseException) -> BaseException | None:
    """Return the failed request that huggingface_hub wrapped in an error; None if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError):
        found = found.__cause__
    return found


def _sentence(error: Exception, repo: str) -> LoftqError:
    endpoint = HfApi().endpoint
    status = _status(error)
    said = _server_words(error)
    tokens = f"{endpoint}/settings/tokens"
    if isinstance(error, OfflineModeIsEnabled):
        return offline()
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return LoftqError(
            f"{endpoint} does not accept the token{said}: make a new one with write access at {tokens}, then run "
            "`hf auth login` or correct HF_TOKEN."
        )
    if status == 403:
        return LoftqError(
            f"the token may not write to {repo}{said}: take one with write access from {tokens}, or give --create-pr "
            "if the repository is not yours."
        )
    if isinstance(error, RevisionNotFoundError):
        return LoftqError(f"{repo} has no such revision{said}: {endpoint}/{repo}/tree/main lists branches and tags.")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return LoftqError(
            f"{endpoint} has no {repo} that this token can see{said}: check the spelling and the token's write access."
        )
    if status in _CONFLICTS:
        return LoftqError(
            f"{repo} was changed by somebody else at the same time{said}: run the same command again.",
            exit_code=ExitCode.INCOMPLETE,
        )
    if (isinstance(error, (HTTPError, CutShort)) and is_transient(error)) or _gave_up(error):
        return LoftqError(
            f"{endpoint} does not answer ({redact(reason(error))}), so {repo} is incomplete: run the same command "
            "again to go on; files that are there are not sent again.",
            exit_code=ExitCode.INCOMPLETE,
        )
    if status:
        return LoftqError(f"{endpoint} refuses the push to {repo} (HTTP status {status}){said}: look at {endpoint}.")
    return LoftqError(f"pushing to {repo} failed ({redact(reason(error))}): run the same command again.")


def _status(error: Exception) -> int:
    """Return the HTTP status, 0 if unknown; hf_xet, which uploads large files, gives it only in its message."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if isinstance(error, PermissionError) and type(error).__module__.startswith("hf_xet"):
        return 403
    match = _XET_REFUSAL.search(str(error)) if isinstance(error, ConnectionError) else None
    return int(match[1]) if match else 0


def _gave_up(error: Exception) -> bool:
    """True if hf_xet lost its connection; by then it has retried for minutes."""
    return isinstance(error, (ConnectionError, TimeoutError))


def _server_words(error: Exception) -> str:
    """Return the Hub's own message in brackets: only it names a full quota or a missing permission."""
    words = getattr(error, "server_message", None)
    if not words:
        return ""
    return f" ({redact(re.sub(r'https?://[^ ]+', '…', ' '.join(str(words).split())))[:200].rstrip('.')})"
