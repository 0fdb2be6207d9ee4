"""The folder that the workers of one run share, in the output's state, on a file system that all of them can see.

.loftq/run-ID/units        the stacks of units to convert, largest first (`WorkList`)
.loftq/run-ID/claims/N     a worker has taken the stack that starts with unit N: created exclusively, which is atomic on
                           every shared file system
.loftq/run-ID/status.R     the status of worker R, rewritten in place every second, which also works on a full disk
.loftq/run-ID/stop         the run has failed; workers exit
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.engine.compute.stacks import Stack, can_stack
from loftq_cli.engine.output.directory import STATE
from loftq_cli.engine.output.lock import Holder, ProcessId
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.json_record import Count, InvalidRecord, json_record, read_json
from loftq_cli.machine.regular_files import read_bounded
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit

MAIN = "main"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0  # without a heartbeat, after which a worker of another launcher counts as dead
_STATUS_BYTES = 4096
_MOST_BYTES = 500_000_000  # of a work list, which has some bytes for each unit
_STATUS_READS = 3  # attempts before a status counts as damaged: its owner may be writing it
_REREAD_SECONDS = 0.05


@json_record
@dataclass(frozen=True)
class WorkList:
    """The work of a run.

    Attributes:
        fingerprint: of the main process's plan.
        units: stacks, as indices into the plan's units.
        finished: units of these stacks that need no work.
        nonfinite: weights with NaN or infinity by tensor name, which headers do not show.
    """

    fingerprint: str
    units: tuple[tuple[Count, ...], ...]
    finished: tuple[Count, ...]
    nonfinite: Mapping[str, str]


@json_record
@dataclass(frozen=True)
class WorkerStatus:
    """The status that a worker, or the main process, shows to the others.

    Attributes:
        beat: increases while the process is running.
        host, place, pid, started: the process, as in `lock.Holder`.
        unit: the tensor it is converting.
        error, exit_code: why it stopped.
        peak_memory, peak_device_memory: bytes.
    """

    beat: Count = 0
    host: str = ""
    place: str = ""
    pid: ProcessId = 0
    started: float = 0.0
    unit: str = ""
    device: str = ""
    done: bool = False
    error: str = ""
    exit_code: ExitCode = ExitCode.DONE
    peak_memory: Count = 0
    peak_device_memory: Count = 0


class Session:
    """The folder of one run."""

    def __init__(self, output: Path, run_id: str) -> None:
        self.run_id = run_id
        self.path = output / STATE / f"run-{run_id}"

    def begin(self, plan: Plan, todo: Sequence[Stack]) -> None:
        """Create the folder and remove those of earlier runs. Only the main process does this, under the lock."""
        for old in self.path.parent.glob("run-*"):
            shutil.rmtree(old, ignore_errors=True)
        draft = self.path.with_name(f"draft-{self.run_id}")
        (draft / "claims").mkdir(parents=True)
        positions = {unit.tensor: i for i, unit in enumerate(plan.units)}
        stacks = [[positions[unit.tensor] for unit in stack.units] for stack in todo]
        stacks.sort(key=lambda stack: (-sum(work_of(plan.units[number]) for number in stack), stack))
        left = {unit.tensor for stack in todo for unit in stack.todo}
        content = WorkList(
            fingerprint=plan.fingerprint,
            units=tuple(map(tuple, stacks)),
            finished=tuple(n for stack in stacks for n in stack if plan.units[n].tensor not in left),
            nonfinite=dict(plan.nonfinite),
        )
        (draft / "units").write_text(json.dumps(dataclasses.asdict(content)))
        os.replace(draft, self.path)

    def exists(self) -> bool:
        return (self.path / "units").exists()

    def work_list(self) -> WorkList:
        """Return the work list that the main process wrote.

        Raises:
            FileNotFoundError: the run is over.
            LoftqError: the file is damaged.
        """
        path = self.path / "units"
        try:
            return read_json(WorkList, read_bounded(path, _MOST_BYTES))
        except InvalidRecord as error:
            raise _damaged(path, error) from error

    def stacks(self, plan: Plan) -> list[Stack]:
        """Return the work to do, largest stacks first.

        Raises:
            FileNotFoundError: the run is over.
            LoftqError: the file is damaged.
        """
        content = self.work_list()
        finished = set(content.finished)
        return [self._stack(plan, position, numbers, finished) for position, numbers in enumerate(content.units)]

    def _stack(self, plan: Plan, position: int, numbers: tuple[int, ...], finished: Collection[int]) -> Stack:
        units = tuple(plan.units[number] for number in numbers if number < len(plan.units))
        if len(units) < len(numbers) or not can_stack(units, plan.recipe):
            problem = f"units[{position}] is not a stack of this conversion's units"
            raise _damaged(self.path / "units", InvalidRecord(problem, is_json=True))
        return Stack(units, tuple(unit for number, unit in zip(numbers, units) if number not in finished))

    def claimed(self, plan: Plan) -> Iterator[Stack]:
        """Yield stacks that no other worker has taken, one by one, largest first; stop if the run has failed."""
        liveness = LivenessMonitor()
        numbers = {unit.tensor: number for number, unit in enumerate(plan.units)}
        for stack in self.stacks(plan):
            if self.stopped() or liveness.why_dead(MAIN, self.statuses().get(MAIN)):
                return
            claim = self.path / "claims" / str(numbers[stack.units[0].tensor])
            try:
                os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield stack

    def stop(self) -> None:
        """Tell every worker that the run has failed."""
        with contextlib.suppress(OSError):
            (self.path / "stop").touch()

    def stopped(self) -> bool:
        return (self.path / "stop").exists() or not self.exists()

    def statuses(self) -> dict[str, WorkerStatus]:
        """Return the latest status of each worker by name, without those that cannot be read at the moment.

        Raises:
            LoftqError: a status is complete but damaged.
        """
        found = {path.name.removeprefix("status."): _read_status(path) for path in self.path.glob("status.*")}
        return {name: status for name, status in found.items() if status is not None}


def _read_status(path: Path) -> WorkerStatus | None:
    damage: InvalidRecord | None = None
    for attempt in range(_STATUS_READS):
        time.sleep(_REREAD_SECONDS if attempt else 0.0)
        try:
            return read_json(WorkerStatus, read_bounded(path, _MOST_BYTES))
        except OSError:
            return None
        except InvalidRecord as error:
            if not error.is_json:
                return None
            damage = error
    assert damage is not None
    raise _damaged(path, damage) from damage


def _damaged(path: Path, error: InvalidRecord) -> LoftqError:
    return LoftqError(
        f"{path} is damaged ({error}): make sure that all workers run the same version of loftq, then run the same "
        "command again to go on.",
        exit_code=ExitCode.INCOMPLETE,
    )


def work_of(unit: Unit) -> int:
    """Return the relative cost of a unit: quantizing a weight takes far longer than copying it."""
    return unit.source.nbytes + (1000 * unit.matrix.weights if unit.matrix is not None else 0)


class Heartbeat:
    """The status file of this process, kept fresh by a thread until `close`."""

    def __init__(self, session: Session, name: str) -> None:
        self._path = session.path / f"status.{name}"
        self._status = WorkerStatus(**dataclasses.asdict(Holder.me()))
        self._mutex, self._stop = threading.Lock(), threading.Event()
        os.stat(session.path)  # if the run has ended, nothing may be written in its place
        self._path.write_bytes(b" " * _STATUS_BYTES)
        self._thread = threading.Thread(target=self._beat, name="loftq-heartbeat", daemon=True)
        self.update()
        self._thread.start()

    def update(self, **changes: object) -> None:
        """Change fields of the status and write it at once."""
        with self._mutex:
            self._status = dataclasses.replace(self._status, **changes, beat=self._status.beat + 1)  # type: ignore[arg-type]
            content = json.dumps(dataclasses.asdict(self._status)).encode()
            if len(content) > _STATUS_BYTES:
                short = dataclasses.replace(self._status, error=self._status.error[:1000])
                content = json.dumps(dataclasses.asdict(short)).encode()[:_STATUS_BYTES]
            with contextlib.suppress(OSError), open(self._path, "r+b") as file:
                file.write(content.ljust(_STATUS_BYTES))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self.update()


class LivenessMonitor:
    """Tells which processes have died.

    A process that can be seen from here is checked directly. Any other counts as dead when its heartbeat has not
    changed for SILENT_SECONDS, measured on this machine's own clock.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def why_dead(self, name: str, status: WorkerStatus | None) -> str | None:
        """Return `has died` or `has been silent for N s`, None while the process is alive. Call it repeatedly."""
        if status is not None:
            alive = Holder(status.host, status.place, status.pid, status.started).seen_alive()
            if alive is not None:
                return None if alive else "has died"
        silent = self.silent_seconds(name, status)
        return f"has been silent for {silent:.0f} s" if silent > SILENT_SECONDS else None

    def silent_seconds(self, name: str, status: WorkerStatus | None) -> float:
        """Return how long the heartbeat has not changed."""
        now, before = time.monotonic(), self._seen.get(name)
        if before is None or (status is not None and status.beat != before[0]):
            self._seen[name] = (-1 if status is None else status.beat, now)
            return 0.0
        return now - before[1]
