"""The main process of a run with several workers: it starts and monitors them and reports progress, and converts
nothing itself."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.engine.compute.stacks import Stack
from loftq_cli.engine.output.directory import STATE, journal_of
from loftq_cli.engine.output.journal import Journal
from loftq_cli.engine.output.lock import Lock
from loftq_cli.engine.workers.order import Order
from loftq_cli.engine.workers.session import MAIN, Heartbeat, LivenessMonitor, Session, WorkerStatus
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.confined import ConfinedFolder
from loftq_cli.machine.openmp import openmp_spin_env
from loftq_cli.machine.usage import Cost
from loftq_cli.planning.plan import Plan
from loftq_cli.progress import Reporter

if TYPE_CHECKING:
    from loftq_cli.engine.workers.launcher import World
    from loftq_cli.engine.workers.order import Order
    from loftq_cli.planning.plan import Plan
    from loftq_cli.progress import Reporter

_POLL_SECONDS = 0.1
_EXIT_SECONDS = 30.0  # for a worker that has nothing left to do


class Team:
    """The processes that share a run; a context manager that stops them if the run fails.

    Args:
        orders: for the workers that the main process starts.
        announce: called with the run's id when workers can join the session.
    """

    def __init__(self, orders: Sequence[Order], announce: Callable[[str], None] = lambda run_id: None) -> None:
        self.orders = orders
        self._announce = announce
        self._session: Session | None = None
        self._heartbeat: Heartbeat | None = None

    def begin(self, plan: Plan, todo: Sequence[Stack]) -> Session:
        """Create the session, start the main process's heartbeat, and let others join."""
        self._session = Session(plan.output, uuid.uuid4().hex[:12])
        self._session.begin(plan, todo)
        self._heartbeat = Heartbeat(self._session, MAIN)
        self._announce(self._session.run_id)
        return self._session

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and self._session is not None:
            self._session.stop()
        if self._heartbeat is not None:
            self._heartbeat.close()


@dataclass(frozen=True)
class Child:
    """A worker of this machine."""

    name: str
    process: subprocess.Popen
    log: IO[bytes]


def supervise(
    plan: Plan, team: Team, todo: Sequence[Stack], reporter: Reporter, lock: Lock
) -> tuple[dict[str, MatrixRecord], Cost]:
    """Have the units of `todo` converted, by workers started here and by any others that join the session.

    Returns:
        The records of the matrices among them, by tensor name, and the cost.

    Raises:
        LoftqError: a worker failed or died (exit code 4, with the matrix it was converting); all workers started here
            are stopped.
    """
    journal = journal_of(plan.output)
    journal.new_entries()  # skip those of earlier runs
    session = team.begin(plan, todo)
    children: list[Child] = []
    try:
        for order in team.orders if todo else ():
            children.append(_start(dataclasses.replace(order, run_id=session.run_id), plan.output / STATE))
        monitor = _Monitor(plan, session, children, journal, reporter)
        while monitor.left:
            monitor.poll()
            lock.check()
            time.sleep(_POLL_SECONDS)
        _await_exit(children)
        return monitor.records, _cost(session.statuses())
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            child.log.close()


class _Monitor:
    """The units that are left, and the workers that convert them."""

    def __init__(
        self, plan: Plan, session: Session, children: Sequence[Child], journal: Journal, reporter: Reporter
    ) -> None:
        self._plan, self._session, self._children = plan, session, children
        self._journal, self._reporter = journal, reporter
        self._units = {unit.tensor: unit for unit in plan.units}
        self._liveness, self._reported = LivenessMonitor(), set[str]()
        self.left = {unit.tensor for stack in session.stacks(plan) for unit in stack.todo}
        self.records: dict[str, MatrixRecord] = {}

    def poll(self) -> None:
        """Report what has been done since the last poll.

        Raises:
            LoftqError: a worker failed or died.
        """
        # In this order, so that the last entries of a worker that has ended are seen before its end.
        codes = {child.name: child.process.poll() for child in self._children}
        statuses = self._session.statuses()
        for entry in self._journal.new_entries():
            if entry.tensor in self.left:
                self.left.discard(entry.tensor)
                if entry.record is not None:
                    self.records[entry.tensor] = entry.record
                self._report_working(entry.tensor)  # its status may have come and gone between two polls
                self._reporter.done(self._units[entry.tensor], entry.record)
        for name, status in statuses.items():
            if name == MAIN:
                continue
            if status.unit:
                self._report_working(status.unit)
            if status.error:
                raise LoftqError(status.error, exit_code=status.exit_code)
            if name not in codes and not status.done and (why := self._liveness.why_dead(name, status)):
                raise _dead(name, status, why)
        for child in self._children:
            if codes[child.name] is not None and self.left:
                self._check_ended(child, statuses.get(child.name, WorkerStatus()), codes)

    def _report_working(self, tensor: str) -> None:
        if tensor not in self._reported:
            self._reported.add(tensor)
            self._reporter.working(self._units[tensor])

    def _check_ended(self, child: Child, status: WorkerStatus, codes: Mapping[str, int | None]) -> None:
        code = codes[child.name]
        if code and code < 0:
            raise _dead(child.name, status, f"was killed by signal {-code}")
        if code:
            raise _dead(child.name, status, f"ended with code {code}{_last_output(child)}")
        others = [name for name in self._session.statuses() if name != MAIN and name not in codes]
        if not others and all(code is not None for code in codes.values()):
            left = sorted(self.left)[0]
            raise LoftqError(
                f"all workers have ended but {left} is not done: run the same command again to go on.",
                exit_code=ExitCode.INCOMPLETE,
            )


def _start(order: Order, state: Path) -> Child:
    """Start a worker in a process session of its own, so that Ctrl-C reaches only the main process."""
    package = str(Path(__file__).resolve().parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # The rank that a launcher gave this process does not apply to its workers.
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": os.pathsep.join(paths), **openmp_spin_env(env)}
    if order.threads is not None:
        env["OMP_NUM_THREADS"] = str(order.threads)
    log = _open_log(ConfinedFolder(state), f"worker.{order.rank}.log")
    process = subprocess.Popen(
        [sys.executable, "-m", "loftq_cli.engine.workers.worker"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=env,
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the monitor will see that it has ended
        process.stdin.write(order.to_json().encode() + b"\n")
        process.stdin.flush()  # stays open: when it closes, the worker knows that this process has ended
    return Child(str(order.rank), process, log)


def _open_log(state: ConfinedFolder, name: str) -> IO[bytes]:
    state.unlink(name)
    return os.fdopen(state.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b")


def _await_exit(children: Sequence[Child]) -> None:
    """Wait a while for workers that have nothing left to do."""
    deadline = time.monotonic() + _EXIT_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return  # everything is on disk, so they may be killed


def _dead(name: str, status: WorkerStatus, how: str) -> LoftqError:
    at = f" while it worked on {status.unit}" if status.unit else ""
    where = f" (process {status.pid} on {status.host})" if status.pid else ""
    return LoftqError(
        f"worker {name}{where} {how}{at}: finished matrices are kept, run the same command again to go on.",
        exit_code=ExitCode.INCOMPLETE,
    )


def _last_output(child: Child) -> str:
    """Return the last line of a worker's log in parentheses, or an empty string."""
    child.log.seek(0)
    lines = child.log.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({last})" if last else ""


def _cost(statuses: Mapping[str, WorkerStatus]) -> Cost:
    """Return the cost of all workers together."""
    workers = [status for name, status in statuses.items() if name != MAIN]
    names = sorted({status.device for status in workers if status.device})
    counts = [f"{sum(status.device == name for status in workers)} × {name}" for name in names]
    return Cost(
        ", ".join(counts),
        sum(status.peak_memory for status in workers),
        sum(status.peak_device_memory for status in workers),
    )


def make_team(orders: list[Order], world: World | None) -> Team | None:
    """Return the team of a run; None if one process works alone."""
    if world is not None:
        return Team(orders, world.announce)
    return Team(orders) if len(orders) > 1 else None
