"""Fetch one text file of a dataset on the Hub, through the Hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.hub.answers import CutShort
from loftq_cli.hub.retry import OPENING_ATTEMPTS, reason, with_retries
from loftq_cli.hub.secrets import redact, scrub, scrubbed_errors

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<place>[^/].*))?")
_TRAINING = re.compile(r"(^|[-_./])train")


def may_be_dataset(name: str, suffixes: tuple[str, ...]) -> bool:
    """True if `name` looks like ORG/NAME or ORG/NAME/PLACE, and not like the path of a text file."""
    match = _NAME.fullmatch(name)
    return match is not None and not match["repo"].endswith(suffixes)


@scrubbed_errors()
def fetch_text(name: str, flag: str, suffixes: tuple[str, ...]) -> Path:
    """Return the path of a dataset's text file in the Hub's cache.

    Args:
        name: ORG/NAME, or ORG/NAME/PLACE with a file or folder of the dataset. Of several files the first by name is
            used, from the training split if there is one.
        flag: the option that `name` was given with, for messages.

    Raises:
        UsageError: the dataset does not exist or contains no text.
        LoftqError: the Hub refuses the request or does not respond.
    """
    match = _NAME.fullmatch(name)
    assert match is not None, "check with may_be_dataset first"
    repo, place = match["repo"], (match["place"] or "").rstrip("/")
    try:
        found = with_retries(lambda: HfApi().dataset_info(repo, timeout=30.0), OPENING_ATTEMPTS)
        file = _choose([sibling.rfilename for sibling in found.siblings or ()], place, suffixes)
        if file is None:
            where = f"{place} of the dataset {repo}" if place else f"the dataset {repo}"
            raise UsageError(f"{flag} {name}: {where} has no {', '.join(suffixes)} file: give one that has.")
        return Path(with_retries(lambda: _download(repo, file, found.sha)))
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, CutShort) as error:
        scrub(error)
        raise _sentence(error, name, repo, flag) from error
    except OSError as error:  # a full disk, or a cache that cannot be written
        raise LoftqError(f"{flag} {name}: {reason(error)}: make room for the Hub's cache, or give a file.") from error


def _choose(names: Iterable[str], place: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the first file by name, from the training split if there is one."""
    here = sorted(
        file
        for file in names
        if file.endswith(suffixes)
        and (not place or f"{file}/".startswith(f"{place}/"))
        and not {"", ".", ".."} & set(file.split("/"))  # a name that would lie outside of the cache
    )
    texts = [file for file in here if not file.rpartition("/")[2].startswith(("README", "dataset_info"))]
    training = [file for file in texts if _TRAINING.search(file[len(place) :])]
    return next(iter(training or texts), None)


def _download(repo: str, file: str, commit: str | None) -> str:
    try:
        return hf_hub_download(repo, file, repo_type="dataset", revision=commit)
    except RuntimeError as error:  # hf_xet raises it when the network fails
        raise CutShort(f"the download of {file} was interrupted ({error})") from error


def _sentence(error: Exception, name: str, repo: str, flag: str) -> LoftqError:
    endpoint = redact(HfApi().endpoint)
    if isinstance(error, OfflineModeIsEnabled) or is_offline_mode():
        return LoftqError(
            f"{flag} {name}: there is no such file or directory, and HF_HUB_OFFLINE is set: unset it, or give a file."
        )
    if isinstance(error, GatedRepoError):
        return LoftqError(f"{flag} {name}: {repo} is gated: request access at {endpoint}/datasets/{repo}.")
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(
            f"{flag} {name}: there is no such file or directory, and {endpoint} has no visible "
            "dataset of that name: check the spelling."
        )
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        status = error.response.status_code
        return LoftqError(
            f"{flag} {name}: {endpoint} refuses the download (HTTP status {status}): give a file instead."
        )
    return LoftqError(
        f"{flag} {name}: there is no such file or directory, and {endpoint} does not respond ({reason(error)}): give a "
        "file, or run the same command again.",
        exit_code=ExitCode.INCOMPLETE,
    )
