"""Read safetensors files over HTTP: the header and each tensor by range requests, without a copy on disk.

The Hub redirects requests for large files to a signed link on another host, which expires. The link is requested once
and used until the host refuses it; the Hub's token is never sent to that host.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from loftq_cli.checkpoint.base import SideFile, TensorInfo, entry, fingerprint
from loftq_cli.checkpoint.local import CONFIG_HINT, collect, read_json
from loftq_cli.checkpoint.safetensors import INDEX, header_length, parse_header
from loftq_cli.checkpoint.side_files import find_side_files
from loftq_cli.errors import LoftqError
from loftq_cli.hub.answers import CutShort
from loftq_cli.hub.read_errors import hub_errors
from loftq_cli.hub.retry import Attempts, HubModel, limit_library, with_retries

_CHUNK = 16 << 20
_CONNECTIONS = 4  # one connection seldom uses the full bandwidth
_TIMEOUT = 30.0  # seconds without data
_PROGRESS = (
    256 << 10
)  # bytes after which failures are counted anew; more than a slow transfer has before it is given up


@dataclass(frozen=True)
class Link:
    """The URL that serves a file's bytes and the headers to send; `foreign` if the host is not the Hub itself."""

    url: str
    headers: Mapping[str, str]
    size: int
    foreign: bool


class RemoteFile:
    """Reads ranges of one file of a commit; thread-safe. Setting `stop` ends waiting; see `hub.retry.Attempts`."""

    def __init__(self, model: HubModel, name: str, stop: threading.Event | None = None) -> None:
        self.model = model
        self.name = name
        self.stop = threading.Event() if stop is None else stop
        self._lock = threading.Lock()
        self._link: Link | None = None

    @property
    def where(self) -> PurePosixPath:
        """Return the repository and the file, for messages."""
        return PurePosixPath(self.model.repo) / self.name

    @property
    def size(self) -> int:
        with hub_errors(self.model, stream=True):
            return with_retries(self._locate, stop=self.stop).size

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return `count` bytes from `start`.

        Raises:
            LoftqError: the Hub refuses the request, or keeps failing (exit code 4).
        """
        found = torch.empty(count, dtype=torch.uint8)
        self.read_into(start, found)
        return found

    def read_into(self, start: int, target: torch.Tensor) -> None:
        """Fill `target`, contiguous bytes, from `start`.

        Raises:
            LoftqError: see `read`.
        """
        view = target.numpy().data
        parts = [(start + at, view[at : at + _CHUNK]) for at in range(0, len(view), _CHUNK)]
        with hub_errors(self.model, stream=True):
            if len(parts) < 2:
                for part in parts:
                    self._fill(*part)
            else:
                with connections(self.stop) as pool:
                    list(pool.map(self._fill, *zip(*parts)))

    def _fill(self, start: int, target: memoryview) -> None:
        """Read into `target`; after a failure, continue after the last byte received."""
        done = mark = 0
        tried = Attempts(stop=self.stop)
        while done < len(target):
            limit_library()
            try:
                with self._request(start + done, start + len(target)) as pieces:
                    for piece in pieces:
                        piece = piece[: len(target) - done]
                        target[done : done + len(piece)] = piece
                        done += len(piece)
                        if done - mark >= _PROGRESS:
                            tried.progressed()
                        if done == len(target):  # more may come from a host that ignores ranges
                            return
                raise CutShort(f"the transfer of {self.where} was interrupted")
            except Exception as error:
                mark = done
                tried.failed(error)

    @contextmanager
    def _request(self, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Yield an iterator over the bytes [start, end) as they arrive."""
        link = self._locate()
        headers = {**link.headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", link.url, headers=headers, timeout=_TIMEOUT) as response:
            if link.foreign and response.status_code in (401, 403, 404, 410):
                self._forget(link)
                raise CutShort(f"the link to {self.where} is no longer valid")
            if response.status_code == 416:
                raise LoftqError(f"{self.where} is shorter than the Hub says: try another --revision.")
            hf_raise_for_status(response)
            whole = response.status_code != 206 and (start, end) == (0, link.size)
            given = response.headers.get("Content-Range", "")
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            if encoded or not (whole or given.startswith(f"bytes {start}-")):
                host = urlsplit(link.url).hostname
                raise LoftqError(f"{host} does not serve parts of files: leave out --stream to download {self.model}.")
            yield response.iter_raw()

    def _locate(self) -> Link:
        with self._lock:
            if self._link is None:
                url = hf_hub_url(self.model.repo, self.name, revision=self.model.revision)
                found = get_hf_file_metadata(url)
                foreign = _origin(found.location) != _origin(url)
                if found.size is None or found.size < 0:
                    raise LoftqError(f"the Hub did not return the size of {self.where}: leave out --stream.")
                headers = build_hf_headers(token=False if foreign else None)
                self._link = Link(found.location, headers, found.size, foreign)
            return self._link

    def _forget(self, link: Link) -> None:
        with self._lock:
            if self._link is link:
                self._link = None


@contextmanager
def connections(stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Yield threads for requests. On an interrupt they are told to stop, because leaving the block waits for them."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            stop.set()
            raise


@dataclass(frozen=True)
class RemoteCheckpoint:
    """Implements `checkpoint.base.Checkpoint` over range requests; `path` contains only the small files."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    fingerprint: str
    files: Mapping[str, RemoteFile] = field(repr=False)
    stop: threading.Event = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        return self._read(self.tensors[name])

    def read_piece(self, name: str, index: int) -> torch.Tensor:
        return self._read(entry(self.tensors[name], index))

    def _read(self, info: TensorInfo) -> torch.Tensor:
        return self.files[info.file].read(info.start, info.nbytes).view(info.dtype).reshape(info.shape)

    def side_files(self) -> tuple[SideFile, ...]:
        return find_side_files(self.path)

    def cancel(self) -> None:
        self.stop.set()

    def close(self) -> None:
        """Stop waiting reads; the connections belong to huggingface_hub's session."""
        self.cancel()


def open_remote(model: HubModel, folder: Path, files: list[str], index: Mapping[str, str] | None) -> RemoteCheckpoint:
    """Read the header of every shard.

    Args:
        model: its revision is a commit.
        folder: the folder with config.json and the other small files.

    Raises:
        LoftqError: the headers, index and sizes contradict each other, or the Hub does not respond.
    """
    config = read_json(folder / "config.json", CONFIG_HINT)
    stop = threading.Event()
    remote = {name: RemoteFile(model, name, stop) for name in files}
    with connections(stop) as pool:
        headers = pool.map(_read_header, remote.values())
        tensors = collect(folder / INDEX, index, (info for header in headers for info in header))
    return RemoteCheckpoint(folder, tensors, config, fingerprint(config, tensors), remote, stop)


def _read_header(file: RemoteFile) -> list[TensorInfo]:
    size = file.size
    length = header_length(file.where, file.read(0, min(size, 8)).numpy().tobytes(), size)
    return parse_header(file.where, file.read(8, length).numpy().tobytes(), size)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
