"""One owner of an output directory, on local disks and on shared ones.

The lock is a file `lock.N` in `.loftq` that is linked into place complete (which NFS does atomically), tells host,
process and the process's start, and whose modification time is its heartbeat. Who finds a stale `lock.N` takes over by
creating `lock.N+1`: of several only one can, and nothing has to be removed first.
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

from loftq_cli.errors import ExitCode, LoftqError, UsageError

BEAT_SECONDS = 5.0
STALE_SECONDS = 120.0  # without a heartbeat, for a lock of another machine
_SAME_START = 2.0  # seconds by which one start time may be told differently when the clock is set
_NAME = re.compile(r"lock\.(\d+)")
_ATTEMPTS = 20


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        place: what must be the same for `pid` to mean anything: machine, boot and process namespace.
        started: the process's start in seconds since 1970, against a reused pid.
    """

    host: str
    place: str
    pid: int
    started: float

    @staticmethod
    def me() -> Holder:
        return Holder(socket.gethostname(), place(), os.getpid(), _start_of(os.getpid()) or time.time())

    def is_alive(self, path: Path) -> bool:
        """By the process itself where it can be seen from here, else by the heartbeat of its lock at `path`."""
        seen = self.seen_alive()
        return _beats(path) if seen is None else seen

    def seen_alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be seen from here."""
        if not self.place or self.place != place():
            return None
        started = _start_of(self.pid)
        return started is not None and abs(started - self.started) <= _SAME_START


class Lock:
    """A held lock; `release` gives it back. Its heart beats in a thread."""

    def __init__(self, path: Path, number: int) -> None:
        self._path, self._next = path, path.with_name(f"lock.{number + 1}")
        self._stop, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="loftq-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            LoftqError: another run took the lock over, because this one was stopped for too long.
        """
        if self._lost:
            raise LoftqError(
                f"another run took {self._path.parent.parent} over while this one stood still: run the same command "
                "again when that one is done.",
                exit_code=ExitCode.INCOMPLETE,
            )

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._lost = self._lost or self._next.exists()
            with contextlib.suppress(OSError):  # the file system may come back
                os.utime(self._path)


def take(folder: Path) -> Lock:
    """Take the lock of the state in `folder`, or take a stale one over.

    Raises:
        UsageError: another run holds it; names host and pid.
    """
    content = json.dumps(asdict(Holder.me())).encode()
    for _ in range(_ATTEMPTS):
        number, path = _highest(folder)
        if path is not None:
            _refuse_if_alive(folder, path)
        mine = folder / f"lock.{number + 1}"
        if not _create(mine, content):
            continue  # somebody was faster
        if _highest(folder)[0] > number + 1:
            mine.unlink(missing_ok=True)  # a gap that a later owner left when it cleared away older locks
            continue
        for older in folder.glob("lock.*"):
            if (match := _NAME.fullmatch(older.name)) and int(match[1]) <= number:
                older.unlink(missing_ok=True)
        return Lock(mine, number + 1)
    raise LoftqError(f"the lock in {folder} changes hands too fast: try again.", exit_code=ExitCode.INCOMPLETE)


def is_lock(path: Path) -> bool:
    """Whether a file of the state is a lock or one that is being made."""
    return path.name.startswith("lock.")


def _refuse_if_alive(folder: Path, path: Path) -> None:
    try:
        holder = Holder(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):  # not written by `_create` as it should be: only its age tells
        holder = Holder("a host unknown", "", 0, 0.0)
    if holder.is_alive(path):
        raise UsageError(
            f"{folder.parent} is being written by process {holder.pid} on {holder.host}: wait for it, or choose "
            "another -o."
        )


def _highest(folder: Path) -> tuple[int, Path | None]:
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return (max(numbers), folder / f"lock.{max(numbers)}") if numbers else (0, None)


def _create(path: Path, content: bytes) -> bool:
    """Whether `path` could be made; where it could, it was never there half-written."""
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
    """Whether the heartbeat is fresh. Both times are the file server's, because clocks of machines differ."""
    probe = path.with_name(f"lock.draft-{uuid.uuid4().hex}")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - path.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def place() -> str:
    """This machine, its boot and the namespace of its process ids."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)


def _start_of(pid: int) -> float | None:
    """When a process of this machine started; None where there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return time.time()  # it is there but will not be looked at
