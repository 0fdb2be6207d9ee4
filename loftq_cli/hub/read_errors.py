"""Turn failures to read a model from the Hub into one sentence each, with the next step."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.hub.answers import CutShort
from loftq_cli.hub.retry import HubModel, is_transient, reason
from loftq_cli.hub.secrets import redact, scrub, scrubbed_errors, users_token

_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def hub_errors(model: HubModel, *, stream: bool = False) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub into one sentence with the next step.

    Errors and their causes are left without tokens and signatures of links, because `--debug` prints them.
    """
    with scrubbed_errors():
        try:
            yield
        except (HTTPError, EntryNotFoundError, CutShort, OSError) as error:
            scrub(error)  # before its text becomes part of the sentence
            raise _sentence(error, model, stream) from error


def _sentence(error: Exception, model: HubModel, stream: bool) -> LoftqError:
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(error, OfflineModeIsEnabled) or (is_offline_mode() and isinstance(error, LocalEntryNotFoundError)):
        return LoftqError(_offline(model, stream))
    if isinstance(cause, HTTPError) or isinstance(error, HTTPError):
        return _network_sentence(cause if isinstance(cause, HTTPError) else error, model)
    if isinstance(error, CutShort):
        return _unreachable(model, f"stopped responding: {reason(error)}")
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return LoftqError(
            f"the disk of the Hub cache is full ({error.strerror}): free some space, or give --stream, which keeps no "
            "copy of the weights.",
            exit_code=ExitCode.INCOMPLETE,
        )
    return LoftqError(f"{model} could not be fetched ({reason(error)}): run the same command again.")


def _network_sentence(error: Exception, model: HubModel) -> LoftqError:
    endpoint = redact(HfApi().endpoint)
    page = f"{endpoint}/{model.repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        login = "" if users_token() else ", then log in with `hf auth login`"
        return LoftqError(f"{model.repo} is gated: request access at {page}{login} and run the same command again.")
    if isinstance(error, RevisionNotFoundError):
        return LoftqError(
            f"{model.repo} has no revision {model.revision}: choose a branch or tag listed at {page}/tree/main."
        )
    if isinstance(error, RepositoryNotFoundError):
        return LoftqError(
            f"there is no directory {model.repo}, and {endpoint} has no visible model of that name: check the "
            "spelling, or log in with `hf auth login` if it is private."
        )
    if isinstance(error, DisabledRepoError):
        return LoftqError(f"{model.repo} was disabled on {endpoint}: give another model.")
    if status == 401:
        return LoftqError(
            f"{endpoint} does not accept the token: create a new one at {endpoint}/settings/tokens and log in with "
            "`hf auth login`, or correct HF_TOKEN."
        )
    if status == 403:
        return LoftqError(
            f"the token may not read {model.repo}: give one with read access from {endpoint}/settings/tokens."
        )
    if isinstance(error, EntryNotFoundError):
        return LoftqError(f"a file of {model} was removed from {endpoint}: run the same command again.")
    if isinstance(error, HfHubHTTPError) and not is_transient(error):
        return LoftqError(f"{endpoint} refuses to send {model} (HTTP status {status}): see {page}.")
    return _unreachable(model, f"does not respond: {reason(error)}")


def _unreachable(model: HubModel, problem: str) -> LoftqError:
    return LoftqError(
        f"{redact(HfApi().endpoint)} {problem}; {model} cannot be read: check the network, then run the same command "
        "again to continue.",
        exit_code=ExitCode.INCOMPLETE,
    )


def _offline(model: HubModel, stream: bool) -> str:
    if stream:
        return "--stream reads from the Hub, but HF_HUB_OFFLINE is set: unset it, or leave out --stream."
    return (
        f"HF_HUB_OFFLINE is set and the Hub cache has no complete copy of {model}: unset it, or download the model "
        f"first with `hf download {model.repo}`."
    )
