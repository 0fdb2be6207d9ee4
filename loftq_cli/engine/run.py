"""Run a plan: claim the output, go on with what an earlier run left, convert the rest, read it all back, publish."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.artifacts.card import render_card
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import FileRecord, Manifest, MatrixRecord, parse_manifest, render, seal
from loftq_cli.artifacts.summary import CARD, Cost, build_manifest, own_cost, pad, text_sizes
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.convert import Converted, convert
from loftq_cli.engine.estimate import choose_pace, fits_a_lane
from loftq_cli.engine.joining import join_adapters
from loftq_cli.engine.journal import Entry, Journal, hash_tensors
from loftq_cli.engine.lanes import Pace, in_lanes
from loftq_cli.engine.lock import Lock
from loftq_cli.engine.memory import reused_memory
from loftq_cli.engine.output import (
    FULL_DISK,
    abandon,
    check_file,
    claim,
    journal_of,
    locate,
    publish,
    write_file,
)
from loftq_cli.engine.progress import Reporter
from loftq_cli.engine.supervise import Team, supervise
from loftq_cli.engine.writer import ShardWriter
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.forward.moments import open_moments
from loftq_cli.kernels import load_kernels
from loftq_cli.planner import Plan, Unit
from loftq_cli.units import UNWEIGHTED


@dataclass(frozen=True)
class Run:
    """What the steps of one run share."""

    plan: Plan
    checkpoint: Checkpoint
    device: torch.device
    reporter: Reporter
    pace: Pace


def run_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    reporter: Reporter,
    overwrite: bool = False,
    max_memory: int | None = None,
    team: Team | None = None,
) -> Manifest:
    """Carry out `plan` and give the manifest of the finished directory. Goes on where an earlier run stopped.

    Args:
        device: what this process computes on, where it works alone.
        max_memory: resident bytes to stay below; None lets tensors be read ahead and converted side by side.
        team: other processes that do the work.

    Raises:
        UsageError: the output directory is not ours to write, or another run is writing it.
        LoftqError: a weight cannot be converted; the disk is full, a worker died, or what was written does not read
            back (exit code 4: the same command goes on).
    """
    if team is None:
        load_kernels(device)  # part of starting up, as importing torch is
    started = time.perf_counter()
    run = Run(plan, checkpoint, device, reporter, choose_pace(plan, device, max_memory))
    with on_full_disk(plan.output), team or nullcontext():
        lock = claim(plan, checkpoint, overwrite)
        try:
            finished = _prepare(run)
            records, cost = _convert_rest(run, finished, lock, team)
            joined = _join(plan)
            return _finish(run, records, joined, dataclasses.replace(cost, seconds=time.perf_counter() - started))
        finally:
            abandon(plan.output, lock)
            reporter.close()


@contextmanager
def on_full_disk(output: Path) -> Iterator[None]:
    """
    Raises:
        LoftqError: for an error of the disk, with exit code 4.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise LoftqError(
            f"writing to {output} failed ({error.strerror}): make room, then run the same command again to go on.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error


def _prepare(run: Run) -> dict[str, Entry]:
    """Lay out the files, and tell which units an earlier run finished: those whose bytes hash to what it recorded."""
    plan, entries = run.plan, journal_of(run.plan.output).entries()
    writer = ShardWriter(lambda name: locate(plan.output, name), plan.written_files)
    writer.prepare()
    try:
        units = [unit for unit in plan.units if unit.tensor in entries]
        found = {unit.tensor: entries[unit.tensor] for unit in units if _is_written(unit, entries[unit.tensor], writer)}
    finally:
        writer.close()
    run.reporter.start(plan, {name: entry.record for name, entry in found.items()})
    return found


def _is_written(unit: Unit, entry: Entry, writer: ShardWriter) -> bool:
    return all(writer.hash(output.name) == entry.hashes.get(output.name) for output in (*unit.backbone, *unit.adapter))


def _convert_rest(
    run: Run, finished: Mapping[str, Entry], lock: Lock, team: Team | None
) -> tuple[dict[str, MatrixRecord], Cost]:
    """Records of all matrices by tensor name, once every unit's bytes are on the disk, and what that took."""
    records = {name: entry.record for name, entry in finished.items() if entry.record is not None}
    todo = [unit for unit in run.plan.units if unit.tensor not in finished]
    if team is not None:
        fresh, cost = supervise(run.plan, team, todo, run.reporter, lock)
        return {**records, **fresh}, cost
    todo.sort(key=lambda unit: (unit.source.file, unit.source.start))  # as the source lies on the disk
    writer = ShardWriter(lambda name: locate(run.plan.output, name), run.plan.written_files)
    writer.open()
    try:
        journal = journal_of(run.plan.output)
        for pace, units in by_size(run, todo):
            with reused_memory() if pace.keeps_memory else nullcontext():
                paced = dataclasses.replace(run, pace=pace)
                records |= work_off(paced, _while_owned(lock, units), writer, journal)
    finally:
        writer.close()
    return records, own_cost(run.device)


def _join(plan: Plan) -> dict[str, str]:
    """Put together what units left in the scratch file; the sha256 of what that makes, by tensor."""
    if plan.scratch is None:
        return {}
    writer = ShardWriter(lambda name: locate(plan.output, name), plan.written_files)
    writer.open()
    try:
        return join_adapters(plan, writer)
    finally:
        writer.close()


def _while_owned(lock: Lock, units: Iterable[Unit]) -> Iterator[Unit]:
    for unit in units:
        lock.check()
        yield unit


def by_size(run: Run, units: Sequence[Unit]) -> list[tuple[Pace, list[Unit]]]:
    """First what shares the machine, then what is converted alone with all of its threads."""
    small = [unit for unit in units if fits_a_lane(unit, run.plan.recipe.method)]
    large = [unit for unit in units if not fits_a_lane(unit, run.plan.recipe.method)]
    return [(run.pace, small), (dataclasses.replace(run.pace, lanes=1, keeps_memory=False), large)]


def work_off(run: Run, units: Iterable[Unit], writer: ShardWriter, journal: Journal) -> dict[str, MatrixRecord]:
    """Convert `units` at the run's pace; the next is read and the last is written meanwhile.

    Returns:
        The records of the matrices among them, by tensor name.
    """
    records: dict[str, MatrixRecord] = {}
    pending: deque[Future[None]] = deque()

    def store(unit: Unit, converted: Converted) -> None:
        tensors = {**converted.backbone, **converted.adapter}
        writer.write(tensors)
        journal.add(Entry(unit.tensor, hash_tensors(tensors), converted.record))
        run.reporter.done(unit, converted.record)

    def taken() -> Generator[Task, None, None]:
        for unit, tensor in (_read_ahead if run.pace.read_ahead else _read)(run.checkpoint, units):
            run.reporter.working(unit)
            yield Task(unit, tensor, _moment(unit, run))

    def work(task: Task) -> None:
        converted = _convert(task, run)
        if converted.record is not None:
            records[task.unit.tensor] = converted.record
        pending.append(writing.submit(store, task.unit, converted))
        if len(pending) > run.pace.lanes:
            pending.popleft().result()  # what is on its way bounds the memory, and a failed write stops the run

    tasks = taken()
    with ThreadPoolExecutor(max_workers=1) as writing, closing(tasks):
        in_lanes(run.pace, tasks, work)
        for write in pending:
            write.result()
    return records


@dataclass(frozen=True)
class Task:
    """A unit with what it is computed from; `moment` as in `engine.convert.convert`."""

    unit: Unit
    tensor: Tensor
    moment: Tensor | None


def _convert(task: Task, run: Run) -> Converted:
    unit = task.unit
    try:
        return convert(unit, task.tensor, run.plan.recipe, run.device, task.moment)
    except torch.OutOfMemoryError as error:
        raise LoftqError(
            f"{run.device} has too little memory for {unit.tensor} {list(unit.source.shape)}: free some, or run the "
            "same command with --device cpu; finished matrices are kept.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error


def _moment(unit: Unit, run: Run) -> Tensor | None:
    """The second moment of what the matrix multiplies, where the recipe asks for calibration and it was seen."""
    if run.plan.moments is None or unit.matrix is None or unit.kind in UNWEIGHTED:
        return None
    return open_moments(run.plan.moments).of(unit.matrix.module, run.plan.recipe.calibrate_kind)


def _read(checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """Units with their tensors, one after the other."""
    for unit in units:
        yield unit, unit.read(checkpoint)


def _read_ahead(checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """Units with their tensors; the next one is read while the caller works on this one."""
    rest = iter(units)
    with ThreadPoolExecutor(max_workers=1) as reading:
        unit = next(rest, None)
        ahead = reading.submit(unit.read, checkpoint) if unit else None
        try:
            while unit is not None and ahead is not None:
                tensor = ahead.result()
                following = next(rest, None)
                ahead = reading.submit(following.read, checkpoint) if following else None
                yield unit, tensor
                unit = following
        except BaseException:  # the caller's too: then this generator is closed
            checkpoint.cancel()  # leaving waits for the thread, which may be waiting for the network
            raise


def _finish(run: Run, records: Mapping[str, MatrixRecord], joined: Mapping[str, str], cost: Cost) -> Manifest:
    """Read everything back, write all but the weights, then make the moves that turn the directory into a model."""
    plan, output = run.plan, run.plan.output
    run.reporter.finishing("reading back what was written")
    files = _check_weights(plan, joined)
    for name, content in plan.texts.items():
        files[name] = write_file(output, name, content)
    for side in plan.side_files:
        files[side.name] = write_file(output, side.name, side.read())
    sizes = text_sizes(plan)
    manifest = build_manifest(plan, run.checkpoint.fingerprint, records, files, cost)
    files[CARD] = write_file(output, CARD, pad(render_card(manifest, plan), sizes.card))
    sealed = seal(pad(render(dataclasses.replace(manifest, files=files)), sizes.manifest))
    write_file(output, MANIFEST, sealed)
    publish(output, [*files, MANIFEST])
    manifest = parse_manifest(output / MANIFEST, sealed)
    run.reporter.finish(manifest)
    return manifest


def _check_weights(plan: Plan, joined: Mapping[str, str]) -> dict[str, FileRecord]:
    """The weight files, read back from the disk.

    Raises:
        LoftqError: one is not what was written; the same command repeats what is damaged.
    """
    entries = journal_of(plan.output).entries()
    hashes = {name: digest for entry in entries.values() for name, digest in entry.hashes.items()} | dict(joined)
    files = {}
    for file in plan.files:
        path = locate(plan.output, file.name)
        files[file.name], damaged = check_file(path, file, hashes)
        if damaged:
            raise LoftqError(
                f"{path} does not hold what was written to it ({damaged[0]} differs): check the disk, then run the "
                "same command again to repeat that part.",
                exit_code=ExitCode.INCOMPLETE,
            )
    return files
