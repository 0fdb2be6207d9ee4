"""`loftq_cli.push`: upload a finished conversion to a repository on the Hub."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.utils import HFValidationError, validate_repo_id

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, read_manifest
from loftq_cli.engine.output.directory import PUSH_STATE, STATE
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.hub.answers import CutShort
from loftq_cli.hub.retry import with_retries
from loftq_cli.machine.confined import ConfinedFolder, real_path, user_path
from loftq_cli.publishing.errors import network_cause, nobody_logged_in, offline, push_errors
from loftq_cli.publishing.stage import Destination, stage
from loftq_cli.verification import verify

_ATTEMPTS = 4  # huggingface_hub already tries every transfer six times
_LONGEST_TITLE = 200
_LONGEST_STATE = 1_000_000
_PULL_REQUEST = re.compile(r"refs/pr/\d+")


@dataclass(frozen=True)
class Pushed:
    """The result of a push, or with `dry_run` what it would be.

    Attributes:
        url: of the repository, the branch or the pull request.
        commit: the newest commit there; None in a dry run.
        files: every file in the repository's own layout, with its size in bytes.
        left_out: files in the directory that are not part of the conversion.
    """

    repo: str
    revision: str | None
    url: str
    commit: str | None
    pull_request: int | None
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True)
class _Request:
    """One call of `push`; `revision` is the ref to push to, the destination's the branch that readers must name."""

    destination: Destination
    revision: str | None
    private: bool
    create_pr: bool
    message: str
    api: HfApi = field(default_factory=lambda: HfApi(library_name="loftq"))

    @property
    def repo(self) -> str:
        return self.destination.repo

    @property
    def title(self) -> str:
        return self.message.splitlines()[0].strip()[:_LONGEST_TITLE]

    @property
    def description(self) -> str | None:
        return "\n".join(self.message.splitlines()[1:]).strip() or None


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Pushed:
    """Verify a finished conversion and upload it. After a failure the same call resumes and sends nothing twice.

    In the pushed copy the adapter's base model, the card's snippets and tags, the recipe and the manifest name the
    repository instead of the directory; the directory itself is not changed.

    Args:
        directory: a finished output of `quantize`.
        repo: `ORG/NAME` on the Hub, created if it does not exist.
        private: create it as a private repository.
        revision: a branch to push to, created if it does not exist, or a pull request's `refs/pr/N`.
        create_pr: push to a pull request; a repeated call uses the one that it opened before.
        message: the commit's message and the pull request's title.
        base_model: `ORG/NAME` of the model that was converted, for the card; by default the one on the card.
        dry_run: verify and list the files without contacting the Hub.
        progress: called with a short description of each step.

    Raises:
        UsageError: an argument is invalid.
        LoftqError: the conversion is unfinished or damaged (exit code 3), the Hub refuses, or the upload broke off
            (exit code 4: the same call resumes).
    """
    path, report = user_path(directory), progress or (lambda step: None)
    request = _request(repo, private, revision, create_pr, message, base_model, path)
    manifest = read_manifest(path)
    if not dry_run:
        require_login()
    report("verifying")
    _verify(path, manifest)
    with tempfile.TemporaryDirectory(prefix="loftq-push-") as folder:
        files = stage(path, manifest, request.destination, Path(folder))
        left_out = _left_out(path, files)
        if dry_run:
            url = f"{request.api.endpoint}/{repo}"
            return Pushed(repo, revision, url, None, None, files, left_out, dry_run=True)
        with push_errors(repo):
            number = _prepare(request, path, report)
            report(f"uploading {len(files)} files")
            commit = with_retries(lambda: _upload(request, Path(folder), number), _ATTEMPTS)
    url = _page(request, number)
    return Pushed(repo, revision, url, commit, number, files, left_out, dry_run=False)


def check_repo(repo: str) -> None:
    """Check that `repo` is a valid name to push to.

    Raises:
        UsageError: it is not `ORG/NAME`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(
            f"'{repo}' is not a repository: write ORG/NAME, with letters, digits, '-', '_' and '.'."
        ) from None
    if repo.count("/") != 1:
        raise UsageError(f"'{repo}' is not a repository: write ORG/NAME, with your own user name or an organization's.")


def require_login() -> None:
    """Check that there is a token and that the Hub may be used.

    Raises:
        LoftqError: there is no token, or HF_HUB_OFFLINE is set.
    """
    if is_offline_mode():
        raise offline()
    if get_token() is None:
        raise nobody_logged_in()


def _request(
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    base_model: str | None,
    directory: Path,
) -> _Request:
    check_repo(repo)
    if base_model is not None:
        check_repo(base_model)
    if create_pr and revision is not None:
        raise UsageError("--create-pr opens a pull request against the default branch: leave --revision out.")
    if message is not None and len(message.strip()) < 3:
        raise UsageError("--message is too short: the Hub requires at least three characters.")
    if revision is not None and (not revision.strip() or any(c.isspace() for c in revision)):
        raise UsageError(f"--revision cannot be {revision!r}: give a branch.")
    branch = None if revision is None or revision == "main" or _PULL_REQUEST.fullmatch(revision) else revision
    target = Destination(repo, branch, base_model)
    text = (message or f"Upload {real_path(directory).name}, converted with loftq").strip()
    return _Request(target, revision, private, create_pr, text)


def _verify(directory: Path, manifest: Manifest) -> None:
    """Check that every file to push is, to the last bit, what was written."""
    ours = {MANIFEST, *manifest.files}
    problems = [problem for problem in verify(directory).problems if problem.name in ours]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LoftqError(
            f"nothing was pushed, {problems[0].name} in {directory} {problems[0].what}{more}: look with `loftq verify "
            f"{directory}`, then convert the model again with --overwrite.",
            exit_code=ExitCode.VERIFICATION_FAILED,
        )


def _left_out(directory: Path, files: Mapping[str, int]) -> tuple[str, ...]:
    found = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    return tuple(p.as_posix() for p in found if p.as_posix() not in files and not p.parts[0].startswith("."))


def _prepare(request: _Request, directory: Path, report: Callable[[str], None]) -> int | None:
    """Create the repository, branch and pull request that are missing; return the pull request's number."""
    api, repo = request.api, request.repo
    report(f"opening {api.endpoint}/{repo}")
    with_retries(lambda: api.create_repo(repo, private=request.private or None, exist_ok=True), _ATTEMPTS)
    if request.private and not with_retries(lambda: api.model_info(repo), _ATTEMPTS).private:
        raise LoftqError(
            f"{repo} exists already and is public, so nothing was pushed: make it private at {api.endpoint}/{repo}/"
            "settings, or leave --private out."
        )
    branch = request.destination.revision
    if branch is not None:
        with_retries(lambda: api.create_branch(repo, branch=branch, exist_ok=True), _ATTEMPTS)
    if not request.create_pr:
        return None
    saved = _SavedNumbers(directory)
    number = with_retries(lambda: _pull_request(request, saved.number(repo)), _ATTEMPTS)
    saved.save(repo, number)
    return number


def _pull_request(request: _Request, kept: int | None) -> int:
    """Return the open pull request of an earlier push, or open one. If the earlier number was lost, because the
    response was cut off or the directory is new, it is found by author and title."""
    api, repo = request.api, request.repo
    me = api.whoami()["name"]
    for found in api.get_repo_discussions(repo, discussion_type="pull_request"):
        mine = found.num == kept or (found.author == me and found.title == request.title)
        if mine and found.status in ("open", "draft"):
            return found.num
    return api.create_pull_request(repo, request.title, description=request.description).num


def _upload(request: _Request, folder: Path, pull_request: int | None) -> str:
    """Upload all files that are missing and return the commit that holds them; no empty commit is made."""
    ref = request.revision if pull_request is None else f"refs/pr/{pull_request}"
    try:
        commit = request.api.upload_folder(
            repo_id=request.repo,
            folder_path=folder,
            commit_message=request.title,
            commit_description=request.description,
            revision=ref,
        )
    except RuntimeError as error:  # raised by huggingface_hub and hf_xet for a failed file
        raise network_cause(error) or CutShort(f"the upload broke off: {error}") from error
    return commit.oid


def _page(request: _Request, pull_request: int | None) -> str:
    page = f"{request.api.endpoint}/{request.repo}"
    if pull_request is not None:
        return f"{page}/discussions/{pull_request}"
    return page if request.destination.revision is None else f"{page}/tree/{request.destination.revision}"


class _SavedNumbers:
    """Numbers of pull requests by repository, kept in the directory's state."""

    def __init__(self, directory: Path) -> None:
        self._folder, self._name = ConfinedFolder(directory), f"{STATE}/{PUSH_STATE}"

    def number(self, repo: str) -> int | None:
        found = self._read().get(repo)
        return found if isinstance(found, int) else None

    def save(self, repo: str, number: int) -> None:
        """Save the number; failing to is harmless, because it can be found again."""
        content = json.dumps({**self._read(), repo: number})
        partial = self._name.replace(".json", ".partial")
        with contextlib.suppress(OSError, LoftqError):
            with self._folder.write(partial) as file:
                file.write(content.encode())
            self._folder.replace(partial, self._name)

    def _read(self) -> dict[str, object]:
        try:
            with self._folder.read(self._name) as file:
                values = json.loads(file.read(_LONGEST_STATE))
        except (OSError, ValueError, RecursionError, LoftqError):
            return {}
        return values if isinstance(values, dict) else {}
