"""What the workers of one run share: a folder in the output's state, on a file system that all of them see.

.loftq/run-ID/units        the batches of units to do, largest first
.loftq/run-ID/claims/N     the batch that unit N begins is taken: created exclusively, which every shared file system
                           does atomically
.loftq/run-ID/status.R     what worker R is at, rewritten in place every second (also on a full disk)
.loftq/run-ID/stop         the run has failed; workers leave
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.engine.compute.stacks import Stack
from loftq_cli.engine.output.directory import STATE
from loftq_cli.engine.output.lock import Holder
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit

MAIN = "main"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0  # without a heartbeat, after which a worker of another launcher counts as dead
_STATUS_BYTES = 4096


@dataclass(frozen=True)
class Status:
    """What a worker is at.

    Attributes:
        beat: grows as long as it lives.
        host, place, pid, started: the process, as in `lock.Holder`.
        unit: the tensor it works on.
        error, exit_code: why it gave up.
    """

    beat: int = 0
    host: str = ""
    place: str = ""
    pid: int = 0
    started: float = 0.0
    unit: str = ""
    device: str = ""
    done: bool = False
    error: str = ""
    exit_code: int = 0
    peak_memory: int = 0
    peak_device_memory: int = 0


class Session:
    """One run's folder."""

    def __init__(self, output: Path, run_id: str) -> None:
        self.run_id = run_id
        self.path = output / STATE / f"run-{run_id}"

    def begin(self, plan: Plan, todo: Sequence[Stack]) -> None:
        """Lay out the folder; those of earlier runs go. Only the main process, under the lock."""
        for old in self.path.parent.glob("run-*"):
            shutil.rmtree(old, ignore_errors=True)
        draft = self.path.with_name(f"draft-{self.run_id}")
        (draft / "claims").mkdir(parents=True)
        positions = {unit.tensor: i for i, unit in enumerate(plan.units)}
        batches = [[positions[unit.tensor] for unit in batch.units] for batch in todo]
        batches.sort(key=lambda batch: (-sum(work_of(plan.units[number]) for number in batch), batch))
        left = {unit.tensor for batch in todo for unit in batch.todo}
        content = {
            "fingerprint": plan.fingerprint,
            "units": batches,
            "finished": [n for batch in batches for n in batch if plan.units[n].tensor not in left],
            "nonfinite": dict(plan.nonfinite),
        }
        (draft / "units").write_text(json.dumps(content))
        os.replace(draft, self.path)

    def exists(self) -> bool:
        return (self.path / "units").exists()

    def fingerprint(self) -> str:
        """Of the plan that the main process made."""
        return json.loads((self.path / "units").read_bytes())["fingerprint"]

    def nonfinite(self) -> dict[str, str]:
        """What the main process found in the weights that no header tells."""
        return json.loads((self.path / "units").read_bytes())["nonfinite"]

    def batches(self, plan: Plan) -> list[Stack]:
        """What there is to do, largest first."""
        content = json.loads((self.path / "units").read_bytes())
        finished = set(content["finished"])
        return [
            Stack(
                tuple(plan.units[number] for number in batch),
                tuple(plan.units[number] for number in batch if number not in finished),
            )
            for batch in content["units"]
        ]

    def claimed(self, plan: Plan) -> Iterator[Stack]:
        """Batches that no other worker has taken, one by one, largest first; none once the run has failed."""
        silence = Silence()
        numbers = {unit.tensor: number for number, unit in enumerate(plan.units)}
        for batch in self.batches(plan):
            if self.stopped() or silence.why_gone(MAIN, self.statuses().get(MAIN)):
                return
            claim = self.path / "claims" / str(numbers[batch.units[0].tensor])
            try:
                os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield batch

    def stop(self) -> None:
        """Tell every worker that the run has failed."""
        with contextlib.suppress(OSError):
            (self.path / "stop").touch()

    def stopped(self) -> bool:
        return (self.path / "stop").exists() or not self.exists()

    def statuses(self) -> dict[str, Status]:
        """The latest of every worker; one that is being rewritten just now is left out."""
        found = {}
        for path in self.path.glob("status.*"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found[path.name.removeprefix("status.")] = Status(**json.loads(path.read_bytes()))
        return found


def work_of(unit: Unit) -> int:
    """What a unit costs, for the order of work: quantizing a weight takes far longer than copying it."""
    return unit.source.nbytes + (1000 * unit.matrix.weights if unit.matrix is not None else 0)


class Presence:
    """A process's status file, kept fresh by a thread."""

    def __init__(self, session: Session, name: str) -> None:
        self._path = session.path / f"status.{name}"
        self._status = Status(**dataclasses.asdict(Holder.me()))
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._path.write_bytes(b" " * _STATUS_BYTES)
        self._thread = threading.Thread(target=self._beat, name="loftq-presence", daemon=True)
        self.tell()
        self._thread.start()

    def tell(self, **changes: object) -> None:
        """Show changed fields at once."""
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
            self.tell()


class Silence:
    """Who is gone: by the process where it can be seen from here, else by a heartbeat that has not changed for
    SILENT_SECONDS of this machine's own clock."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def why_gone(self, name: str, status: Status | None) -> str | None:
        """`has died` or `has been silent …`; None while it lives. To be called again and again."""
        if status is not None:
            alive = Holder(status.host, status.place, status.pid, status.started).seen_alive()
            if alive is not None:
                return None if alive else "has died"
        silent = self.seconds(name, status)
        return f"has been silent for {silent:.0f} s" if silent > SILENT_SECONDS else None

    def seconds(self, name: str, status: Status | None) -> float:
        """For how long the heartbeat has not changed."""
        now, before = time.monotonic(), self._seen.get(name)
        if before is None or (status is not None and status.beat != before[0]):
            self._seen[name] = (-1 if status is None else status.beat, now)
            return 0.0
        return now - before[1]
