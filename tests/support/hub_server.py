"""A small Hub on loopback for the real huggingface_hub client: repositories with commits, the model API, file downloads
with signed links on a second origin, access rules, and failures on demand.

    with HubServer() as hub:
        hub.add("org/name", folder)
        hub.fail("resolve/.*safetensors", status=503, times=2)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS = (".safetensors", ".bin", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass
class Repo:
    """One model: `commits` maps a sha to its files, `refs` a branch or tag to a sha."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit and move `ref` to it."""
        digest = hashlib.sha1(ref.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + content)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


@dataclass(frozen=True)
class Request:
    """One line of the log. `host` is `hub` or `cdn`."""

    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Failure:
    """The fate of the next `times` requests that match.

    Attributes:
        path, range: regular expressions, found anywhere.
        status: a status with `headers` and `body`; None answers, but sends only the first `cut` bytes of the body.
    """

    path: str
    method: str = "GET"
    host: str = "hub"
    range: str = ""
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int = 0
    times: int = 1


class HubServer:
    """The Hub at `url`, its storage host at `cdn`.

    Attributes:
        tokens: token → repositories its owner was let into (gated and private ones).
        link_uses: how many requests a signed link is good for; None for any number.
        ranges: whether the storage host honours Range.
        surplus: bytes that the storage host sends after the range that was asked for.
        sent_surplus: how many of them it got rid of.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {"hf_good": set()}
        self.failures: list[Failure] = []
        self.log: list[Request] = []
        self.link_uses: int | None = None
        self.ranges = True
        self.surplus = self.sent_surplus = 0
        self.lock = threading.Lock()
        self.links: list[tuple[str, int]] = []  # content digest, uses so far
        self.blobs: dict[str, bytes] = {}
        self._servers = [self._serve(handler) for handler in self.handlers()]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def handlers(self) -> tuple[type[_Handler], type[_Handler]]:
        """Of the Hub and of its storage host."""
        return _Hub, _Storage

    def add(self, name: str, files: Path | Mapping[str, bytes], **access: bool) -> Repo:
        """Create a repository with one commit on `main`."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos[name] = Repo(**access)
        repo.commit(files)
        return repo

    def fail(self, path: str, **how: object) -> None:
        """Make requests fail whose path matches the regex `path`; see `Failure`."""
        self.failures.append(Failure(path, **how))  # type: ignore[arg-type]

    def requests(self, path: str = "", **like: str) -> list[Request]:
        """Return the logged requests whose path matches and whose fields have the given values."""
        return [
            entry
            for entry in self.log
            if re.search(path, entry.path) and all(getattr(entry, name) == value for name, value in like.items())
        ]

    def sign(self, content: bytes) -> str:
        """Return a link to `content` on the storage host."""
        digest = hashlib.sha256(content).hexdigest()
        with self.lock:
            self.blobs[digest] = content
            self.links.append((digest, 0))
            return f"{self.cdn}/{digest}?Signature=secret-{len(self.links) - 1}"

    def _serve(self, handler: type[_Handler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


class _Handler(ABC, BaseHTTPRequestHandler):
    """The part common to both hosts: log, failures, bodies and ranges."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    host = ""
    cut: int | None = None

    def log_message(self, *_: object) -> None:
        """The log is `HubServer.log`."""

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may hang up
            self._handle()

    do_HEAD = do_GET

    @abstractmethod
    def route(self) -> None:
        """Answer the request."""

    def _handle(self) -> None:
        self.cut = None
        headers = self.headers
        entry = Request(self.host, self.command, unquote(self.path), headers["Range"], headers["Authorization"])
        with self.hub.lock:
            self.hub.log.append(entry)
            failure = next((one for one in self.hub.failures if one.times > 0 and self._hit(one, entry)), None)
            if failure is not None:
                failure.times -= 1
        if failure is not None and failure.status is not None:
            self.answer(failure.status, failure.body, dict(failure.headers))
            return
        self.cut = failure.cut if failure is not None else None
        self.route()

    def _hit(self, failure: Failure, entry: Request) -> bool:
        same = (failure.host, failure.method) == (entry.host, entry.method)
        found = re.search(failure.path, entry.path) and re.search(failure.range, entry.range or "")
        return same and found is not None

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if self.cut is None else body[: self.cut])
        if self.cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def answer_content(self, content: bytes, headers: Mapping[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if match is None or not self.hub.ranges:
            self.answer(200, content, headers)
            return
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start > end:
            self.answer(416)
            return
        ranged = {"Content-Range": f"bytes {start}-{end}/{len(content)}", **headers}
        if self.hub.surplus and self.host == "cdn":
            self.close_connection = True
            self.answer(
                206, content[start : end + 1], {**ranged, "Content-Length": str(end + 1 - start + self.hub.surplus)}
            )
            for _ in range(self.hub.surplus >> 20):
                self.wfile.write(bytes(1 << 20))
                self.hub.sent_surplus += 1 << 20
            return
        self.answer(206, content[start : end + 1], ranged)

    def error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        self.answer(status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {}))


class _Hub(_Handler):
    host = "hub"

    def route(self) -> None:
        path = urlsplit(self.path).path
        for pattern, action in self._routes():
            match = re.fullmatch(pattern, path)
            if match is not None:
                self._open(action, {name: unquote(value) for name, value in match.groupdict().items() if value})
                return
        self.error(404, "", "Not Found")

    def _routes(self) -> Iterator[tuple[str, Callable[[Repo, str, str, str], None]]]:
        name = r"(?P<repo>[^/]+/[^/]+)"
        yield rf"/api/(?:models|datasets)/{name}(?:/revision/(?P<revision>[^/]+))?", self._info
        yield rf"/api/models/{name}/tree/(?P<revision>[^/]+)(?P<file>.*)", self._tree
        yield rf"(?:/datasets)?/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve

    def _open(self, action: Callable[[Repo, str, str, str], None], given: dict[str, str]) -> None:
        """Refuse requests without permission, as the Hub does."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        name, revision = given["repo"], given.get("revision", "main")
        repo = self.hub.repos.get(name)
        allowed = self.hub.tokens.get(token, set())
        if token and token not in self.hub.tokens:
            self.error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and name not in allowed):
            self.error(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and name not in allowed and action == self._resolve:
            self.error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif repo.refs.get(revision, revision) not in repo.commits:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            action(repo, name, repo.refs.get(revision, revision), given.get("file", ""))

    def _info(self, repo: Repo, name: str, sha: str, _: str) -> None:
        siblings = [{"rfilename": file} for file in repo.commits[sha]]
        gated = "manual" if repo.gated else False
        known = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": gated}
        self.answer(200, json.dumps({**known, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}).encode())

    def _tree(self, repo: Repo, _: str, sha: str, __: str) -> None:
        entries = []
        for file, content in repo.commits[sha].items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if file.endswith(LFS):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.answer(200, json.dumps(entries).encode())

    def _resolve(self, repo: Repo, _: str, sha: str, file: str) -> None:
        content = repo.commits[sha].get(file)
        if content is None:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not file.endswith(LFS):
            self.answer_content(content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            return
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        self.answer(302, b"", {**headers, **linked, "Location": self.hub.sign(content)})


class _Storage(_Handler):
    host = "cdn"

    def route(self) -> None:
        parts = urlsplit(self.path)
        number = parse_qs(parts.query).get("Signature", [""])[0].removeprefix("secret-")
        with self.hub.lock:
            digest, uses = self.hub.links[int(number)] if number.isdigit() else ("", 0)
            if digest:
                self.hub.links[int(number)] = (digest, uses + 1)
        if digest != parts.path.strip("/") or (self.hub.link_uses is not None and uses >= self.hub.link_uses):
            self.answer(403, b"<Error>Request has expired</Error>", {"Content-Type": "application/xml"})
            return
        self.answer_content(self.hub.blobs[digest], {"ETag": f'"{digest}"'})


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Return the environment in which a process uses `hub` as the Hub, without a token."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@contextlib.contextmanager
def talking_to(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process's huggingface_hub use `hub`, with an empty cache, nobody logged in, and no pauses between
    attempts."""
    from huggingface_hub import close_session, constants, hf_api

    from loftq_cli.hub import retry

    for name, value in environment(hub, home).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    changes = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # behind the module's functions, which PEFT calls
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    close_session()
    try:
        yield
    finally:
        close_session()
