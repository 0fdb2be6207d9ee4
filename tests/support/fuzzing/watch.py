"""What a process does while a case runs: what it starts, writes, deletes and connects to, its time and its memory."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STARTS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.fork"})
# Events that change a folder, and the positions of their paths and of the folders that these are relative to.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
}
_MOST_WALL = 12  # times the limit, whatever the machine is busy with
_HARMLESS = ("/dev/null", "/dev/tty", "/proc")


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """Audit hook: what Python is asked to do while a case runs. Hooks cannot be removed, so there is one, switched."""

    _one: Watch | None = None

    def __init__(self) -> None:
        self.active = False
        self.folder = threading.local()  # the folder that a relative name is opened in
        self.seen: list[str] = []
        self.allowed: tuple[str, ...] = ()
        sys.addaudithook(self._hook)

    @classmethod
    def get(cls) -> Watch:
        cls._one = cls._one or cls()
        return cls._one

    @contextmanager
    def watching(self, *allowed: Path) -> Iterator[list[str]]:
        """Forbidden events while the block runs; files may be written and deleted below `allowed`."""
        self.seen, self.active = [], True
        self.allowed = (*(str(path) for path in allowed), *_HARMLESS)
        real = os.open

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            # The event does not say which folder a name is relative to.
            self.folder.path = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            return real(path, flags, mode, dir_fd=dir_fd)

        os.open = opened
        try:
            yield self.seen
        finally:
            os.open, self.active = real, False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        started = event in _STARTS or event == "pickle.find_class"
        imported = event == "import" and str(arguments[0]).startswith("modeling_evil")
        connected = event in ("socket.connect", "socket.getaddrinfo") and "127.0.0.1" not in repr(arguments)
        if started or imported or connected:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)) and _writes(arguments):
            base = getattr(self.folder, "path", None) if arguments[1] is None else None  # os.open has no mode
            flags = arguments[2]
            follows = not flags & os.O_NOFOLLOW and flags & (os.O_CREAT | os.O_EXCL) != os.O_CREAT | os.O_EXCL
            self._check("writes", os.path.join(base or os.getcwd(), os.fsdecode(arguments[0])), follows)
        elif event in _CHANGES:
            for position, folder in _CHANGES[event]:
                handle = -1 if folder is None else arguments[folder]
                base = os.getcwd() if handle in (-1, None) else os.readlink(f"/proc/self/fd/{handle}")
                if isinstance(arguments[position], (str, bytes, os.PathLike)):
                    self._check(event, os.path.join(base, os.fsdecode(arguments[position])), event == "os.truncate")

    def _check(self, what: str, path: str, follows: bool) -> None:
        """Note a change of a path outside of the allowed ones, after following the links on the way to it."""
        folder, leaf = os.path.split(os.path.normpath(path))
        real = os.path.realpath(path) if follows else os.path.join(os.path.realpath(folder), leaf)
        if what == "writes" and os.path.isdir(real):
            return  # a file without a name in this folder
        inside = any(real == one or real.startswith(f"{one.rstrip('/')}/") for one in self.allowed)
        if not inside and "__pycache__" not in real:
            self.seen.append(f"{what} {real}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    """True if a file with a name may change; a file that is made without a name disappears by itself."""
    flags = arguments[2] if isinstance(arguments[2], int) else 0
    nameless = flags & os.O_TMPFILE == os.O_TMPFILE
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and not nameless


class Clock:
    """Seconds that a busy machine does not lengthen: without those in which this process waits for a core."""

    def __init__(self) -> None:
        self._wall, self._waits = time.monotonic(), _waits()

    def wall(self) -> float:
        return time.monotonic() - self._wall

    def seconds(self) -> float:
        waited = max((wait - self._waits.get(task, 0.0) for task, wait in _waits().items()), default=0.0)
        return max(0.0, self.wall() - waited)


def _waits() -> dict[str, float]:
    """Return for each thread the seconds in which it was ready and had no core; nothing where Linux does not tell."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            found[path.parent.name] = int(path.read_text().split()[1]) / 1e9
    return found


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise `Hang` after some seconds; where even that does not help, say where and end the process."""
    clock = Clock()

    def fire(*_: object) -> None:
        if clock.seconds() > seconds or clock.wall() > _MOST_WALL * seconds:
            raise Hang

    before = signal.signal(signal.SIGALRM, fire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    faulthandler.dump_traceback_later(2 * _MOST_WALL * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


class Memory:
    """How far the resident memory rises above where it was, in bytes."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        self._before = _status("VmRSS")

    def growth(self) -> int:
        return max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
