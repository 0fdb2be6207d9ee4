"""A lock that gives an output directory one owner, on local and on shared file systems.

The lock is a file `lock.N` in `.loftq`. It is linked into place when complete (which is atomic on NFS), names the host,
the process and the process's start time, and its modification time is its heartbeat. A process that finds a stale
`lock.N` takes over by creating `lock.N+1`: only one process can, and nothing has to be removed first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.machine.json_record import InvalidRecord, json_record, read_json

BEAT_SECONDS = 5.0
STALE_SECONDS = 120.0  # without a heartbeat, for a lock of another machine
_SAME_START = 2.0  # seconds by which two readings of the same start time may differ if the clock is adjusted
ProcessId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_NAME = re.compile(r"lock\.(\d+)")
_ATTEMPTS = 20
_LONGEST_LOCK = 1 << 16  # bytes; locks have some hundreds


@json_record
@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        place: machine, boot and process namespace, outside of which `pid` means nothing.
        started: start time of the process in seconds since 1970, which reveals a reused pid.
    """

    host: str
    place: str
    pid: ProcessId
    started: float

    @staticmethod
    def me() -> Holder:
        return Holder(socket.gethostname(), place(), os.getpid(), _start_of(os.getpid()) or time.time())

    def is_alive(self, path: Path) -> bool:
        """True if the process is running; if it cannot be seen from here, true if the lock at `path` is fresh."""
        seen = self.seen_alive()
        return _beats(path) if seen is None else seen

    def seen_alive(self) -> bool | None:
        """True if the process is running; None if it cannot be seen from here."""
        if not self.place or self.place != place():
            return None
        started = _start_of(self.pid)
        return started is not None and abs(started - self.started) <= _SAME_START


class Lock:
    """A held lock, kept fresh by a thread until `release`."""

    def __init__(self, path: Path, number: int) -> None:
        self._path, self._next = path, path.with_name(f"lock.{number + 1}")
        self._stop, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="loftq-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            LoftqError: another run took the lock over because this one was suspended for too long.
        """
        if self._lost:
            raise LoftqError(
                f"another run took {self._path.parent.parent} over while this one was suspended: run the same command "
                "again when that one has finished.",
                exit_code=ExitCode.INCOMPLETE,
            )

    def release(self) -> None:
        """Remove the lock."""
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._lost = self._lost or self._next.exists()
            with contextlib.suppress(OSError):  # the file system may come back
                os.utime(self._path)


def take(folder: Path) -> Lock:
    """Take the lock of the state in `folder`, or take over a stale one.

    Raises:
        UsageError: another run holds it (the message names host and pid), or a lock that is not stale is damaged.
    """
    content = json.dumps(asdict(Holder.me())).encode()
    for _ in range(_ATTEMPTS):
        number, path = _highest(folder)
        if path is not None:
            _refuse_if_alive(folder, path)
        mine = folder / f"lock.{number + 1}"
        if not _create(mine, content):
            continue  # another process created it first
        if _highest(folder)[0] > number + 1:
            mine.unlink(missing_ok=True)  # a gap that a later owner left when it cleared away older locks
            continue
        for older in folder.glob("lock.*"):
            if (match := _NAME.fullmatch(older.name)) and int(match[1]) <= number:
                older.unlink(missing_ok=True)
        return Lock(mine, number + 1)
    raise LoftqError(f"the lock in {folder} changes owners too quickly: try again.", exit_code=ExitCode.INCOMPLETE)


def _refuse_if_alive(folder: Path, path: Path) -> None:
    try:
        with ConfinedFolder(folder).read(path.name) as handle:
            holder = read_json(Holder, handle.read(_LONGEST_LOCK))
    except FileNotFoundError:
        return
    except (OSError, InvalidRecord) as error:
        if _beats(path):  # only its age shows if its owner is still running
            raise UsageError(
                f"{folder.parent} may be in use, but its lock {path} is damaged ({error}): try again in "
                f"{STALE_SECONDS / 60:.0f} minutes, when the lock expires, or choose another -o."
            ) from None
        return
    if holder.is_alive(path):
        raise UsageError(
            f"{folder.parent} is being written by process {holder.pid} on {holder.host}: wait for it, or choose "
            "another -o."
        )


def _highest(folder: Path) -> tuple[int, Path | None]:
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return (max(numbers), folder / f"lock.{max(numbers)}") if numbers else (0, None)


def _create(path: Path, content: bytes) -> bool:
    """Create `path` atomically with its content; False if it exists already."""
    draft = path.with_name(f"lock.draft-{uuid.uuid4().hex}")
    draft.write_bytes(content)
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_exclusively(path, content)  # a file system without hard links
    finally:
        draft.unlink(missing_ok=True)


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(handle, "wb") as file:
        file.write(content)
    return True


def _beats(path: Path) -> bool:
    """True if the heartbeat is fresh. The file server sets both times, because the clocks of machines differ."""
    probe = path.with_name(f"lock.draft-{uuid.uuid4().hex}")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - path.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def place() -> str:
    """Return an id of this machine, its boot and its process namespace."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)


def _start_of(pid: int) -> float | None:
    """Return the start time of a process on this machine, None if there is no such process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return time.time()  # the process exists, but this user may not inspect it
