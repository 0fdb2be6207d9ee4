"""A worker: converts units of a shared run, as a process of its own or as a rank of a launcher's world."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.engine.workers.order import Order
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.hub.secrets import redact
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.printable import printable

if TYPE_CHECKING:
    from loftq_cli.artifacts.manifest import Manifest
    from loftq_cli.machine.usage import Cost
    from loftq_cli.progress import Reporter

_APPEAR_SECONDS = 60.0
_POLL_SECONDS = 0.2


def main() -> None:
    """`python -m loftq_cli.engine.workers.worker`: read the order from a line of stdin; exit when stdin closes."""
    try:
        order = Order.from_json(sys.stdin.readline())
    except LoftqError as error:
        print(f"loftq: {printable(redact(str(error)))}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    threading.Thread(target=_exit_with_main, daemon=True).start()
    sys.exit(carry_out(order))


def carry_out(order: Order) -> int:
    """Work until nothing is left and return the exit code. Errors go into the status, not to the terminal."""
    from loftq_cli.engine.workers.session import Heartbeat, Session

    try:
        heartbeat = Heartbeat(Session(Path(order.output), order.run_id), str(order.rank))
    except (FileNotFoundError, NotADirectoryError):
        return ExitCode.INCOMPLETE  # the run has ended already
    try:
        cost = _work(order, heartbeat.update)
        heartbeat.update(done=True, unit="", peak_memory=cost.memory, peak_device_memory=cost.device_memory)
        return ExitCode.DONE
    except LoftqError as error:
        heartbeat.update(error=str(error), exit_code=error.exit_code)
        return int(error.exit_code)
    except Exception as error:
        import traceback

        traceback.print_exc()
        heartbeat.update(error=f"unexpected {type(error).__name__}: {error}", exit_code=ExitCode.FAILED)
        return ExitCode.FAILED
    finally:
        heartbeat.close()


def follow(order: Order) -> Manifest:
    """Work as a rank of a launcher's world whose main process is another rank, then wait for that one to finish.

    Raises:
        LoftqError: the run failed here or elsewhere, or the main process died (exit code 4).
    """
    from loftq_cli.artifacts.manifest import read_manifest
    from loftq_cli.engine.workers.session import MAIN, LivenessMonitor, Session

    output = Path(order.output)
    session, liveness, started = Session(output, order.run_id), LivenessMonitor(), time.monotonic()
    while not session.exists() and time.monotonic() - started < _APPEAR_SECONDS:
        time.sleep(_POLL_SECONDS)  # a shared file system may show it late
    if session.exists():
        carry_out(order)
    while session.exists() and not session.stopped():
        if liveness.why_dead(MAIN, session.statuses().get(MAIN)):
            break
        time.sleep(_POLL_SECONDS)
    if session.exists() or not (output / "config.json").exists():
        raise LoftqError(
            f"the run on {output} did not finish: run the same command again to go on.",
            exit_code=ExitCode.INCOMPLETE,
        )
    return read_manifest(output)


@full_precision()
def _work(order: Order, update: Callable[..., None]) -> Cost:
    import torch

    from loftq_cli._version import __version__
    from loftq_cli.calibration.calibrate import known_moments, pin_calibration
    from loftq_cli.checkpoint import open_source
    from loftq_cli.engine.compute.pipeline import Run, run_stacks
    from loftq_cli.engine.cost.memory import keeps_little
    from loftq_cli.engine.cost.schedule import choose_schedule
    from loftq_cli.engine.output.directory import STATE, journal_of, on_full_disk, open_writer
    from loftq_cli.engine.workers.session import Session
    from loftq_cli.kernels import load_kernels
    from loftq_cli.machine.memory import shared_memory
    from loftq_cli.machine.usage import own_cost
    from loftq_cli.planning.plan import make_plan
    from loftq_cli.recipe.model import Recipe

    if order.threads is not None:
        torch.set_num_threads(order.threads)
    output, session = Path(order.output), Session(Path(order.output), order.run_id)
    device = torch.device(order.device)
    update(device=own_cost(device).device)
    work = session.work_list()
    with open_source(Recipe(**order.recipe), stream=order.stream) as (checkpoint, recipe), on_full_disk(output):
        recipe = pin_calibration(recipe)
        plan = make_plan(recipe, checkpoint, output, __version__, work.nonfinite if recipe.allow_nonfinite else None)
        if plan.fingerprint != work.fingerprint:
            raise LoftqError(
                f"this worker's source or loftq version differs from the main process's ({output / STATE}): use the "
                "same model, command and versions on all machines."
            )
        plan = known_moments(plan, checkpoint)
        load_kernels(plan.grids, device)
        schedule = choose_schedule(plan, device, order.max_memory)
        keeps = schedule.keeps_memory and all(keeps_little(unit, recipe.method) for unit in plan.units)
        # One lane: the other workers already keep the machine busy.
        schedule = dataclasses.replace(schedule, lanes=1, keeps_memory=keeps)
        run = Run(plan, checkpoint, device, _status_reporter(update), schedule)
        with open_writer(output, plan.written_files) as writer, shared_memory(keeps=keeps):
            journal = journal_of(output).of_worker(f"{order.run_id}.{order.rank}")
            run_stacks(run, session.claimed(plan), writer, journal)
    return own_cost(device)


def _status_reporter(update: Callable[..., None]) -> Reporter:
    """Return a reporter that shows the current unit in the status."""
    from loftq_cli.progress import Reporter

    class StatusReporter(Reporter):
        def working(self, unit) -> None:
            update(unit=unit.tensor)

    return StatusReporter()


def _exit_with_main() -> None:
    """Exit when the main process ends, which closes its end of the pipe."""
    while sys.stdin.read(1):
        time.sleep(0.1)
    os._exit(ExitCode.INCOMPLETE)


if __name__ == "__main__":
    main()
