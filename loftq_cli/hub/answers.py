"""Bound what a host may answer: the size of what is held in memory, and the time of a transfer that hardly moves.

huggingface_hub reads its answers whole: lists of files, error pages and the bodies of redirects. Files are written to
the disk as they come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import HTTPError

from loftq_cli.errors import LoftqError

LARGEST = 64 << 20  # bytes; a list of 100,000 files has about 10 MB
_LARGEST_PACKED = 1 << 20  # gzip expands at most about a thousandfold
_SLOW, _SLOWEST = 120.0, 1000  # a transfer is given up if, after these seconds, it has fewer bytes per second
_PACKED = frozenset({"gzip", "deflate"})
_http = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx, under the name that huggingface_hub uses


class CutShort(Exception):
    """An answer ended before it was complete, or the link to a file is no longer valid."""


def bound_answer(response: Any) -> None:
    """Make a response end in an error if it is too large or too slow. A hook of httpx, called before a body is read.

    Raises:
        LoftqError: an answer that is read whole is packed in a way that could expand to any size.
    """
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    most = None
    if _is_held(response):
        most = LARGEST
        if encoding != "identity":
            most = _LARGEST_PACKED
            if encoding not in _PACKED:
                raise LoftqError(f"{_host(response)} packs its answers as {encoding!r:.40}: check HF_ENDPOINT.")
    response.stream = _Bounded(response.stream, most, _host(response))


def _is_held(response: Any) -> bool:
    """True if the body is held in memory: not a file, whose path has `/resolve/` or `/resolve-cache/`, or on another
    host a signed link."""
    path = urlsplit(str(response.url)).path
    return response.status_code >= 300 or ("/api/" in path and "/resolve" not in path)


def _host(response: Any) -> str:
    return urlsplit(str(response.url)).hostname or "the host"


class _Bounded(_http.SyncByteStream):  # type: ignore[name-defined, misc]
    def __init__(self, stream: Any, most: int | None, host: str) -> None:
        self._stream, self._most, self._host = stream, most, host

    def __iter__(self) -> Iterator[bytes]:
        """
        Raises:
            LoftqError: there are more bytes than allowed.
            CutShort: they come too slowly.
        """
        began, count = time.monotonic(), 0
        for piece in self._stream:
            count += len(piece)
            if self._most is not None and count > self._most:
                raise LoftqError(
                    f"{self._host} answers with more than {self._most >> 20} MB, which no model needs: check "
                    "HF_ENDPOINT and the name of the model."
                )
            seconds = time.monotonic() - began
            if seconds > _SLOW and count / seconds < _SLOWEST:
                raise CutShort(f"the answer of {self._host} is slower than {_SLOWEST} bytes per second")
            yield piece

    def close(self) -> None:
        self._stream.close()
