"""The write side of the Hub on loopback: repositories, branches, pull requests, LFS objects and commits.

with WriteHub() as hub:
    hub.sever("/upload/", method="PUT", after=10_000)   # break the connection during an upload
    hub.fail("/commit/", method="POST", cut=0)           # commit, but lose the response
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_server import LFS, HubServer, Repo, Request, _Handler, _Hub, _Storage

PART = 50_000  # larger files go in parts of this size, as the Hub's do above a few GB
_NOW = "2030-01-02T03:04:05.000Z"


@dataclass
class User:
    """The owner of a token, and the namespaces it may write to."""

    name: str
    namespaces: frozenset[str]


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    status: str = "draft"


@dataclass
class Severed:
    """A connection that breaks when `after` bytes of a request's body have arrived."""

    path: str
    method: str
    after: int
    times: int = 1


@dataclass
class Writes:
    """The write side's state of one repository."""

    pull_requests: list[PullRequest] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)  # ref, message; one for each commit


class WriteHub(HubServer):
    """A Hub that takes uploads.

    Attributes:
        users: by token; another token is not known.
        received: sha256 of every object whose upload arrived completely, in order.
    """

    def __init__(self) -> None:
        self.users = {"hf_good": User("alice", frozenset({"alice", "some-org"}))}
        self.severed: list[Severed] = []
        self.writes: dict[str, Writes] = {}
        self.received: list[str] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        super().__init__()

    def handlers(self) -> tuple[type[_Handler], type[_Handler]]:
        return _WriteHub, _WriteStorage

    def sever(self, path: str, *, method: str, after: int, times: int = 1) -> None:
        """Break the connection of requests whose path matches the regex `path`."""
        self.severed.append(Severed(path, method, after, times))

    def of(self, repo: str) -> Writes:
        return self.writes.setdefault(repo, Writes())

    def files(self, repo: str, ref: str = "main") -> dict[str, bytes]:
        """Return the files of a ref."""
        return self.repos[repo].commits[self.repos[repo].refs[ref]]


class _Hangup(ConnectionError):
    """This connection was broken on purpose."""


class _Receiving(_Handler):
    """Requests with a body."""

    hub: WriteHub
    body: bytes = b""

    def do_POST(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.body = self._receive()
            self._handle()

    do_PUT = do_POST

    def _receive(self) -> bytes:
        with self.hub.lock:
            path, found = unquote(self.path), self.hub.severed
            hit = next((s for s in found if s.times and s.method == self.command and re.search(s.path, path)), None)
            if hit is not None:
                hit.times -= 1
                self.hub.log.append(Request(self.host, self.command, path, None, self.headers["Authorization"]))
        received, limit = bytearray(), None if hit is None else hit.after
        for chunk in self._chunks():
            received += chunk
            if limit is not None and len(received) >= limit:
                break
        if limit is not None:
            # RST instead of FIN, as if the cable were cut.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            raise _Hangup
        return bytes(received)

    def _chunks(self) -> Iterator[bytes]:
        if self.headers["Transfer-Encoding"] == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"] or 0)
        while left:
            chunk = self.rfile.read(min(left, 4096))
            if not chunk:
                raise ConnectionError
            left -= len(chunk)
            yield chunk

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


class _WriteHub(_Receiving, _Hub):
    def route(self) -> None:
        path, name = urlsplit(self.path).path, r"(?P<repo>[^/]+/[^/]+)"
        api = rf"/api/models/{name}"
        table: tuple[tuple[str, str, Callable[..., None]], ...] = (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", rf"{api}/branch/(?P<ref>[^/]+)", self._branch),
            ("POST", rf"{api}/preupload/(?P<ref>[^/]+)", self._preupload),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("POST", rf"{api}/commit/(?P<ref>[^/]+)", self._commit),
            ("GET", rf"{api}/discussions", self._discussions),
            ("GET", rf"{api}/discussions/(?P<num>\d+)", self._discussion),
            ("POST", rf"{api}/discussions", self._open_discussion),
        )
        for method, pattern, action in table:
            match = re.fullmatch(pattern, path)
            if match is not None and method == self.command:
                self._allow(action, {key: unquote(value) for key, value in match.groupdict().items()})
                return
        if self.command == "POST":
            self.error(404, "", "Not Found")
        else:
            super().route()

    @property
    def user(self) -> User | None:
        return self.hub.users.get((self.headers["Authorization"] or "").removeprefix("Bearer "))

    def _allow(self, action: Callable[..., None], given: dict[str, str]) -> None:
        name = given.get("repo")
        open_to_all = action in (self._discussions, self._discussion, self._open_discussion, self._preupload)
        reference = given.get("ref", "").startswith("refs/pr/") or action == self._batch
        if action == self._validate:
            action()
        elif self.user is None:
            self.error(401, "", "Invalid credentials in Authorization header")
        elif name is not None and name not in self.hub.repos:
            self.error(404, "RepoNotFound", "Repository not found")
        elif name and not (open_to_all or reference or name.split("/")[0] in self.user.namespaces):
            self.error(403, "", f"you have no write access to {name}")
        elif name is None:
            action()
        else:
            action(name, **{key: value for key, value in given.items() if key != "repo"})

    def _whoami(self) -> None:
        assert self.user is not None
        self.answer_json({"type": "user", "name": self.user.name, "orgs": []})

    def _validate(self) -> None:
        """Check the front matter of a card, as the Hub does before it accepts the card."""
        import yaml

        content = json.loads(self.body)["content"]
        front = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = [] if isinstance(front, dict) else [{"message": "metadata is no mapping"}]
        self.answer_json({"errors": errors, "warnings": []}, 200 if not errors else 400)

    def _create(self) -> None:
        asked, user = json.loads(self.body), self.user
        assert user is not None
        name = f"{asked['organization'] or user.name}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name.split("/")[0] not in user.namespaces:
            self.error(403, "", f"you may not create models under {name.split('/')[0]}")
        elif name in self.hub.repos:
            self.answer_json(url | {"error": "You already created this model repo"}, 409)
        else:
            repo = self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            repo.private = asked.get("visibility") == "private"
            for token, owner in self.hub.users.items():
                if name.split("/")[0] in owner.namespaces:
                    self.hub.tokens.setdefault(token, set()).add(name)
            self.answer_json(url)

    def _branch(self, name: str, ref: str) -> None:
        repo = self.hub.repos[name]
        if ref in repo.refs:
            self.error(409, "", "Reference already exists")
        else:
            repo.refs[ref] = repo.refs["main"]
            self.answer_json({})

    def _preupload(self, name: str, ref: str) -> None:
        repo = self.hub.repos[name]
        if ref not in repo.refs:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            return
        here, answers = repo.commits[repo.refs[ref]], []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS)
            found: dict[str, Any] = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            if file["path"] in here:
                found["oid"] = _oid(here[file["path"]], large)
            answers.append(found | {"shouldIgnore": False})
        self.answer_json({"files": answers})

    def _batch(self, name: str) -> None:
        answers = []
        for asked in json.loads(self.body)["objects"]:
            found: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                link, count = f"{self.hub.cdn}/upload/{asked['oid']}", -(-asked["size"] // PART)
                header = {str(part): f"{link}/{part}?Signature=secret" for part in range(1, count + 1)}
                if count > 1:
                    upload = {
                        "href": f"{link}/complete?Signature=secret",
                        "header": {"chunk_size": str(PART), **header},
                    }
                else:
                    upload = {"href": f"{link}/1?Signature=secret"}
                found["actions"] = {"upload": upload}
            answers.append(found)
        self.answer_json({"transfer": "basic", "objects": answers})

    def _commit(self, name: str, ref: str) -> None:
        repo, lines = self.hub.repos[name], [json.loads(line) for line in self.body.splitlines()]
        if ref not in repo.refs:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            return
        files, header = dict(repo.commits[repo.refs[ref]]), lines[0]["value"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in self.hub.blobs:
                self.error(400, "", f"Your push was rejected because it contains missing LFS objects: {value['path']}")
                return
            files[value["path"]] = (
                self.hub.blobs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
        sha = _move(repo, ref, files, header["summary"])
        self.hub.of(name).messages.append((ref, header["summary"]))
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _discussions(self, name: str) -> None:
        wanted = parse_qs(urlsplit(self.path).query)
        found = [one for one in self.hub.of(name).pull_requests if wanted.get("author", [one.author]) == [one.author]]
        listed = [self._described(name, one) for one in found]
        self.answer_json({"count": len(listed), "start": 0, "discussions": listed})

    def _discussion(self, name: str, num: str) -> None:
        one = self.hub.of(name).pull_requests[int(num) - 1]
        details = {"changes": {"base": "main"}, "filesWithConflicts": [], "events": [], "diff": ""}
        self.answer_json(self._described(name, one) | details)

    def _open_discussion(self, name: str) -> None:
        asked, known, user = json.loads(self.body), self.hub.of(name).pull_requests, self.user
        assert asked["pullRequest"] and user is not None
        known.append(PullRequest(len(known) + 1, asked["title"], asked["description"], user.name))
        repo = self.hub.repos[name]
        repo.refs[f"refs/pr/{len(known)}"] = repo.refs["main"]
        self.answer_json({"num": len(known)})

    def _described(self, name: str, one: PullRequest) -> dict[str, Any]:
        return {
            "num": one.num,
            "title": one.title,
            "author": {"name": one.author},
            "createdAt": _NOW,
            "status": one.status,
            "repo": {"name": name, "type": "model"},
            "isPullRequest": True,
        }


class _WriteStorage(_Receiving, _Storage):
    def route(self) -> None:
        match = re.fullmatch(r"/upload/([0-9a-f]{64})/(\d+|complete)", urlsplit(self.path).path)
        if match is None or self.command == "GET":
            super().route()
            return
        assert self.headers["Authorization"] is None, "the token must not be sent to the storage host"
        digest, part = match[1], match[2]
        if part == "complete":
            numbers = [piece["partNumber"] for piece in json.loads(self.body)["parts"]]
            self._keep(digest, b"".join(self.hub.parts[digest, number] for number in numbers))
            return
        with self.hub.lock:
            self.hub.parts[digest, int(part)] = self.body
        if hashlib.sha256(self.body).hexdigest() == digest:
            self._keep(digest, self.body)
        else:
            self.answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def _keep(self, digest: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != digest:
            self.answer(400, b"BadDigest")
            return
        with self.hub.lock:
            self.hub.blobs[digest] = content
            self.hub.received.append(digest)
        self.answer(200, b"", {"ETag": f'"{digest}"'})


def _oid(content: bytes, large: bool) -> str:
    """Return the name of an object in git and LFS."""
    return hashlib.sha256(content).hexdigest() if large else hashlib.sha1(_git_blob(content)).hexdigest()


def _git_blob(content: bytes) -> bytes:
    return b"blob %d\0" % len(content) + content


def _move(repo: Repo, ref: str, files: dict[str, bytes], message: str) -> str:
    """Make a commit on `ref` whose sha also depends on its parent."""
    sha = hashlib.sha1(f"{repo.refs[ref]} {message}".encode()).hexdigest()
    repo.commits[sha] = files
    repo.refs[ref] = sha
    return sha
