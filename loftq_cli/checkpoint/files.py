"""Read ranges of weight files without maps: a file that is cut off meanwhile ends in a sentence, not in SIGBUS."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import BinaryIO

import torch

from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.regular_files import open_regular
from loftq_cli.machine.system import read_at

_PIECE = 16 << 20  # bytes read at a time
MAX_TOKENIZER = 64 << 20  # bytes; the largest published tokenizer.model has 10 MB


class LocalFile:
    """Reads ranges of one file; thread-safe. The file is opened at the first read."""

    def __init__(self, path: Path) -> None:
        self.where = path
        self._lock = threading.Lock()
        self._handle: BinaryIO | None = None

    @property
    def size(self) -> int:
        return os.fstat(self._open()).st_size

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return `count` bytes from `start`.

        Raises:
            LoftqError: the file ends before, or cannot be read.
        """
        found = torch.empty(count, dtype=torch.uint8)
        self.read_into(start, found)
        return found

    def read_into(self, start: int, target: torch.Tensor) -> None:
        """Fill `target`, contiguous bytes, from `start`.

        Raises:
            LoftqError: the file ends before, or cannot be read.
        """
        view, done = target.numpy().data, 0
        while done < len(view):
            try:
                count = read_at(self._open(), view[done : done + _PIECE], start + done)
            except OSError as error:
                raise LoftqError(
                    f"{self.where} cannot be read ({error.strerror}): check the disk, then run the same command again.",
                    exit_code=ExitCode.INCOMPLETE,
                ) from error
            if count == 0:
                raise LoftqError(
                    f"{self.where} was cut off while it was read: restore the file, then run the same command again.",
                    exit_code=ExitCode.INCOMPLETE,
                )
            done += count

    def close(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def _open(self) -> int:
        with self._lock:
            if self._handle is None:
                self._handle = open_regular(self.where)
            return self._handle.fileno()
