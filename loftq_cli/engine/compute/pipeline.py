"""The work of a run: units are read, sent to the device, converted, brought back and written, each while others are at
the next stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.calibration.moments import open_moments
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.compute.convert import Converted, convert, convert_together
from loftq_cli.engine.compute.lanes import Pace, in_lanes
from loftq_cli.engine.compute.stacks import Batch
from loftq_cli.engine.compute.transfers import Leaving, Staged, Transfers, transfers_of
from loftq_cli.engine.output.journal import Entry, Journal, hash_tensors
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.memory import Room, is_out_of_memory
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import UNWEIGHTED, Unit
from loftq_cli.progress import Reporter
from loftq_cli.tensorfile.writer import ShardWriter


@dataclass(frozen=True)
class Run:
    """What the steps of one run share."""

    plan: Plan
    checkpoint: Checkpoint
    device: torch.device
    reporter: Reporter
    pace: Pace


@dataclass(frozen=True)
class Task:
    """A batch with what it is computed from, unit by unit; `moment`, of a unit alone, as `engine.convert.convert` has
    it."""

    batch: Batch
    staged: tuple[Staged, ...]
    moment: Tensor | None


@dataclass(frozen=True)
class Finished:
    """A converted unit on its way to the disk."""

    unit: Unit
    outputs: Leaving
    record: MatrixRecord | None


def work_off(run: Run, batches: Iterable[Batch], writer: ShardWriter, journal: Journal) -> dict[str, MatrixRecord]:
    """Convert `batches` at the run's pace; the next is read and the last is written meanwhile.

    Returns:
        The records of the matrices that were to be done, by tensor name.
    """
    records: dict[str, MatrixRecord] = {}
    pending: deque[Future[None]] = deque()
    transfers, room = transfers_of(run.device), Room()

    def store(finished: deque[Finished]) -> None:
        while finished:  # what is written is let go
            one = finished.popleft()
            tensors = transfers.land(one.outputs)
            writer.write(tensors)
            journal.add(Entry(one.unit.tensor, hash_tensors(tensors), one.record))
            run.reporter.done(one.unit, one.record)

    def taken() -> Generator[Task, None, None]:
        for batch, staged in (_read_ahead if run.pace.read_ahead else _read)(run.checkpoint, batches, transfers):
            for unit in batch.todo:
                run.reporter.working(unit)
            yield Task(batch, staged, _moment(batch, run))

    def work(task: Task) -> None:
        finished = _finish(task, run, transfers, room)
        records.update({one.unit.tensor: one.record for one in finished if one.record is not None})
        pending.append(writing.submit(store, finished))
        if len(pending) > run.pace.lanes:
            pending.popleft().result()  # what is on its way bounds the memory, and a failed write stops the run

    tasks = taken()
    with ThreadPoolExecutor(max_workers=1) as writing, closing(tasks):
        in_lanes(run.pace, tasks, work)
        for write in pending:
            write.result()
    return records


def _finish(task: Task, run: Run, transfers: Transfers, room: Room) -> deque[Finished]:
    """The outputs of those units of a task that are to be written."""
    units, tensors = task.batch.units, [transfers.arrive(staged) for staged in task.staged]
    todo = {unit.tensor for unit in task.batch.todo}
    found = _together(units, tensors, run, transfers) if len(units) > 1 else None
    if found is not None:
        return deque(one for one in found if one.unit.tensor in todo)
    pairs = [(unit, tensor) for unit, tensor in zip(units, tensors) if unit.tensor in todo]
    return deque(_alone(unit, tensor, task.moment, run, transfers, room) for unit, tensor in pairs)


def _together(
    units: Sequence[Unit], tensors: Sequence[Tensor], run: Run, transfers: Transfers
) -> list[Finished] | None:
    """None where the device has too little memory for all of them at once: then their last bits may differ."""
    try:
        converted = convert_together(units, tensors, run.plan.recipe, run.device)
        return [_leaving(unit, one, transfers) for unit, one in zip(units, converted)]
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def _alone(unit: Unit, tensor: Tensor, moment: Tensor | None, run: Run, transfers: Transfers, room: Room) -> Finished:
    """
    Raises:
        LoftqError: the device has too little memory.
    """
    try:
        return _leaving(unit, convert(unit, tensor, run.plan.recipe, run.device, moment, room), transfers)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        instead = "--max-memory" if run.device.type == "cpu" else "--device cpu"
        raise LoftqError(
            f"{run.device} has too little memory for {unit.tensor} {list(unit.source.shape)}: free some, or run the "
            f"same command with {instead}; finished matrices are kept.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error


def _leaving(unit: Unit, converted: Converted, transfers: Transfers) -> Finished:
    return Finished(unit, transfers.leave({**converted.backbone, **converted.adapter}), converted.record)


def _moment(batch: Batch, run: Run) -> Tensor | None:
    """The second moment of what the matrix multiplies, where the recipe asks for calibration and it was seen."""
    unit = batch.units[0]
    if len(batch.units) > 1 or run.plan.moments is None or unit.matrix is None or unit.kind in UNWEIGHTED:
        return None
    return open_moments(run.plan.moments).of(unit.matrix.module, run.plan.recipe.calibrate_kind)


def _staged(batch: Batch, checkpoint: Checkpoint, transfers: Transfers) -> tuple[Staged, ...]:
    """What a batch is computed from, read and sent on its way; what is only copied stays here."""
    return tuple(
        Staged(unit.read(checkpoint)) if unit.matrix is None else transfers.stage(unit.read(checkpoint))
        for unit in batch.units
    )


def _read(
    checkpoint: Checkpoint, batches: Iterable[Batch], transfers: Transfers
) -> Iterator[tuple[Batch, tuple[Staged, ...]]]:
    """Batches with their tensors, one after the other."""
    for batch in batches:
        yield batch, _staged(batch, checkpoint, transfers)


def _read_ahead(
    checkpoint: Checkpoint, batches: Iterable[Batch], transfers: Transfers
) -> Iterator[tuple[Batch, tuple[Staged, ...]]]:
    """Batches with their tensors; the next one is read while the caller works on this one."""
    rest = iter(batches)
    with ThreadPoolExecutor(max_workers=1) as reading:
        batch = next(rest, None)
        ahead = reading.submit(_staged, batch, checkpoint, transfers) if batch else None
        try:
            while batch is not None and ahead is not None:
                staged = ahead.result()
                following = next(rest, None)
                ahead = reading.submit(_staged, following, checkpoint, transfers) if following else None
                yield batch, staged
                batch = following
        except BaseException:  # the caller's too: then this generator is closed
            checkpoint.cancel()  # leaving waits for the thread, which may be waiting for the network
            raise
