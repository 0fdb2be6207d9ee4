"""Run each job in its own process, so that a crash or the kernel's out-of-memory killer affects only that job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.batches.expand import Job
from loftq_cli.errors import ExitCode
from loftq_cli.machine.system import usable_cores

_SENTENCE = "loftq: "
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_TAIL = 20  # lines of stderr kept for the error of a process that died without a sentence


@dataclass(frozen=True)
class Ended:
    """The result of a process: its exit code (negative for a signal) and, if it failed, a sentence with the reason."""

    exit_code: int
    error: str | None


class Children:
    """The running processes of a batch; all of them can be stopped at once."""

    def __init__(self, options: Sequence[str], jobs: int) -> None:
        self._options = list(options)
        self._environment = _environment(jobs)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self.stopping = False

    def run(self, job: Job, on_line: Callable[[str], None]) -> Ended:
        """Convert; call `on_line` with every line that the process writes to stderr."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="loftq-", encoding="utf-8") as recipe:
            recipe.write(_yaml(job))
            recipe.flush()
            command = [sys.executable, "-m", "loftq_cli", "quantize", "--config", recipe.name, "-o", str(job.output)]
            process = self._start([*command, *self._options])
            if process is None:
                return Ended(int(ExitCode.INTERRUPTED), None)
            return self._follow(process, on_line)

    def interrupt(self) -> None:
        """Send SIGINT to every process and start no more."""
        self._send(signal.SIGINT)

    def kill(self) -> None:
        """Send SIGKILL to every process that is still running."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.send_signal(number)

    def _start(self, command: list[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=self._environment,
                start_new_session=True,  # so Ctrl-C at the terminal reaches it only once, from us
            )
            self._running.add(process)
            return process

    def _follow(self, process: subprocess.Popen[str], on_line: Callable[[str], None]) -> Ended:
        assert process.stderr is not None
        tail: list[str] = []
        for line in process.stderr:
            line = line.rstrip()
            if line:
                tail = [*tail[1 - _TAIL :], line]
                on_line(line)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return Ended(code, _error(code, tail))


def _environment(jobs: int) -> dict[str, str]:
    """Return the environment of a child process; several of them share the cores, unless the user has set threads."""
    environment = dict(os.environ)
    # `python -m loftq_cli` must find this copy of the package, wherever it was imported from.
    home = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environment.get("PYTHONPATH")]))
    if jobs > 1 and not any(name in environment for name in _THREADS):
        share = str(max(1, usable_cores() // jobs))
        environment.update(dict.fromkeys(_THREADS, share))
    return environment


def _yaml(job: Job) -> str:
    import yaml

    values: dict[str, Any] = dict(job.recipe)
    if job.push_to is not None:
        values["push_to"] = job.push_to
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _error(code: int, tail: Sequence[str]) -> str | None:
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
        return f"the process was terminated by {name}{memory}: run the same command again to go on."
    sentences = [line.removeprefix(_SENTENCE) for line in tail if line.startswith(_SENTENCE)]
    last = sentences[-1] if sentences else tail[-1] if tail else f"the process exited with code {code} and no message"
    return re.sub(r"\s+", " ", last)
