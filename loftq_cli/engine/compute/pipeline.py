"""The pipeline of a run: units are read, uploaded to the device, converted, downloaded and written, all at the same
time for different units."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.calibration.moments import open_moments
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.compute.convert import Converted, convert, convert_together
from loftq_cli.engine.compute.lanes import Schedule, in_lanes
from loftq_cli.engine.compute.stacks import Stack
from loftq_cli.engine.compute.transfers import PendingDownload, Transfers, Upload, transfers_of
from loftq_cli.engine.output.commits import Commits
from loftq_cli.engine.output.journal import Entry, Journal, hash_tensor, hash_tensors
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.machine.memory import Float32Buffer, is_out_of_memory
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import UNWEIGHTED, Unit
from loftq_cli.progress import Reporter
from loftq_cli.tensorfile.writer import ShardWriter


@dataclass(frozen=True)
class Run:
    """The objects that all stages of one run share."""

    plan: Plan
    checkpoint: Checkpoint
    device: torch.device
    reporter: Reporter
    schedule: Schedule


@dataclass(frozen=True)
class Task:
    """A stack with the source tensor of each unit.

    Attributes:
        hashes: the sha256 of each source tensor of `stack.todo` as it was read, by name.
        moment: of a single unit, as in `engine.compute.convert.convert`.
    """

    stack: Stack
    uploads: tuple[Upload, ...]
    hashes: Mapping[str, str]
    moment: Tensor | None


@dataclass(frozen=True)
class Finished:
    """A converted unit on its way to the disk."""

    unit: Unit
    outputs: PendingDownload
    record: MatrixRecord | None


@dataclass(frozen=True)
class _Sources:
    """The source tensors of a stack, being uploaded, and their hashes as in `Task`."""

    uploads: tuple[Upload, ...]
    hashes: Mapping[str, str]


def run_stacks(run: Run, stacks: Iterable[Stack], writer: ShardWriter, journal: Journal) -> dict[str, MatrixRecord]:
    """Convert `stacks` as the run's schedule says, while the next is read and the last is written.

    Returns:
        The records of the converted matrices by tensor name.
    """
    records: dict[str, MatrixRecord] = {}
    pending: deque[Future[None]] = deque()
    transfers, buffer = transfers_of(run.device), Float32Buffer()

    def store(finished: deque[Finished], sources: Mapping[str, str]) -> None:
        while finished:  # removed one by one, so that memory is freed as soon as a unit is written
            one = finished.popleft()
            tensors = transfers.download(one.outputs)
            entry = Entry(one.unit.tensor, hash_tensors(tensors), one.record, sources[one.unit.tensor])
            commits.add(entry, tensors)
            run.reporter.done(one.unit, one.record)

    def taken() -> Generator[Task, None, None]:
        read = _read_ahead if run.schedule.read_ahead else _read
        for stack, sources in read(run.checkpoint, stacks, transfers):
            for unit in stack.todo:
                run.reporter.working(unit)
            yield Task(stack, sources.uploads, sources.hashes, _moment(stack, run))

    def work(task: Task) -> None:
        finished = _finish(task, run, transfers, buffer)
        records.update({one.unit.tensor: one.record for one in finished if one.record is not None})
        pending.append(writing.submit(store, finished, task.hashes))
        if len(pending) > run.schedule.lanes:
            pending.popleft().result()  # bounds the memory of pending writes, and lets a failed one stop the run

    tasks, commits = taken(), Commits(writer, journal)
    with commits, ThreadPoolExecutor(max_workers=1) as writing, closing(tasks):
        in_lanes(run.schedule, tasks, work)
        for write in pending:
            write.result()
    return records


def _finish(task: Task, run: Run, transfers: Transfers, buffer: Float32Buffer) -> deque[Finished]:
    """Convert a task and return the units whose outputs are to be written."""
    units, tensors = task.stack.units, [transfers.finish_upload(upload) for upload in task.uploads]
    todo = {unit.tensor for unit in task.stack.todo}
    found = _together(units, tensors, run, transfers) if len(units) > 1 else None
    if found is not None:
        return deque(one for one in found if one.unit.tensor in todo)
    pairs = [(unit, tensor) for unit, tensor in zip(units, tensors) if unit.tensor in todo]
    return deque(_alone(unit, tensor, task.moment, run, transfers, buffer) for unit, tensor in pairs)


def _together(
    units: Sequence[Unit], tensors: Sequence[Tensor], run: Run, transfers: Transfers
) -> list[Finished] | None:
    """Convert a stack at once; None if the device has too little memory, in which case the last bits may differ."""
    try:
        converted = convert_together(units, tensors, run.plan.recipe, run.device)
        return [_finished(unit, one, transfers) for unit, one in zip(units, converted)]
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def _alone(
    unit: Unit, tensor: Tensor, moment: Tensor | None, run: Run, transfers: Transfers, buffer: Float32Buffer
) -> Finished:
    """Convert one unit.

    Raises:
        LoftqError: the device has too little memory.
    """
    try:
        return _finished(unit, convert(unit, tensor, run.plan.recipe, run.device, moment, buffer), transfers)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        instead = "--max-memory" if run.device.type == "cpu" else "--device cpu"
        raise LoftqError(
            f"{run.device} has too little memory for {unit.tensor} {list(unit.source.shape)}: free some, or run the "
            f"same command with {instead}; finished matrices are kept.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error


def _finished(unit: Unit, converted: Converted, transfers: Transfers) -> Finished:
    return Finished(unit, transfers.prepare_download({**converted.backbone, **converted.adapter}), converted.record)


def _moment(stack: Stack, run: Run) -> Tensor | None:
    """Return the second moment of a matrix's inputs, if the recipe asks for calibration and the inputs were seen."""
    unit = stack.units[0]
    if len(stack.units) > 1 or run.plan.moments is None or unit.matrix is None or unit.kind in UNWEIGHTED:
        return None
    return open_moments(run.plan.moments).of(unit.matrix.module, run.plan.recipe.calibrate_kind)


def _upload(stack: Stack, checkpoint: Checkpoint, transfers: Transfers) -> _Sources:
    """Read a stack's tensors, hash them and start uploading them; those that are only copied stay on the CPU."""
    uploads, hashes, todo = list[Upload](), dict[str, str](), {unit.tensor for unit in stack.todo}
    for unit in stack.units:
        tensor = unit.read(checkpoint)
        uploads.append(Upload(tensor) if unit.matrix is None else transfers.start_upload(tensor))
        if unit.tensor in todo:
            hashes[unit.tensor] = hash_tensor(tensor)
    return _Sources(tuple(uploads), hashes)


def _read(checkpoint: Checkpoint, stacks: Iterable[Stack], transfers: Transfers) -> Iterator[tuple[Stack, _Sources]]:
    """Yield stacks with their tensors, one after the other."""
    for stack in stacks:
        yield stack, _upload(stack, checkpoint, transfers)


def _read_ahead(
    checkpoint: Checkpoint, stacks: Iterable[Stack], transfers: Transfers
) -> Iterator[tuple[Stack, _Sources]]:
    """Yield stacks with their tensors, reading the next one while the caller works on this one."""
    rest = iter(stacks)
    with ThreadPoolExecutor(max_workers=1) as reading:
        stack = next(rest, None)
        ahead = reading.submit(_upload, stack, checkpoint, transfers) if stack else None
        try:
            while stack is not None and ahead is not None:
                sources = ahead.result()
                following = next(rest, None)
                ahead = reading.submit(_upload, following, checkpoint, transfers) if following else None
                yield stack, sources
                stack = following
        except BaseException:  # including GeneratorExit, when the caller fails
            checkpoint.cancel()  # leaving the `with` waits for the thread, which may be waiting for the network
            raise
