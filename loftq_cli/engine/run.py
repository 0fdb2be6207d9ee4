"""Run a plan on one device: read ahead, convert, write behind, record, finish."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.artifacts.card import render_card
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import FileRecord, Manifest, MatrixRecord, render
from loftq_cli.artifacts.summary import CARD, build_manifest, pad, text_sizes
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.convert import Converted, convert
from loftq_cli.engine.estimate import may_read_ahead
from loftq_cli.engine.journal import Entry, hash_tensors
from loftq_cli.engine.output import (
    claim,
    hash_file,
    journal_of,
    locate,
    publish,
    write_file,
)
from loftq_cli.engine.progress import Reporter
from loftq_cli.engine.writer import ShardWriter
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.forward.moments import open_moments
from loftq_cli.planner import Plan, Unit

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


@dataclass(frozen=True)
class Run:
    """What the steps of one run share."""

    plan: Plan
    checkpoint: Checkpoint
    device: torch.device
    reporter: Reporter
    started: float
    read_ahead: bool


def run_plan(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    reporter: Reporter,
    overwrite: bool = False,
    max_memory: int | None = None,
) -> Manifest:
    """Carry out `plan` and give the manifest of the finished directory. Goes on where an earlier run stopped.

    Args:
        max_memory: resident bytes to stay below; None lets the next tensor be read ahead whatever it takes.

    Raises:
        UsageError: the output directory is not ours to write.
        LoftqError: a weight cannot be converted, or the disk is full (exit code 4: the same command goes on).
    """
    read_ahead = may_read_ahead(plan, device, max_memory)
    claim(plan, overwrite)
    run = Run(plan, checkpoint, device, reporter, time.perf_counter(), read_ahead)
    try:
        records = _convert_all(run)
        return _finish(run, records)
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise LoftqError(
                f"writing to {plan.output} failed ({error.strerror}): make room, then run the same command again to go "
                "on.",
                exit_code=ExitCode.INCOMPLETE,
            ) from error
        raise
    finally:
        reporter.close()


def _convert_all(run: Run) -> dict[str, MatrixRecord]:
    """Records of all matrices by tensor name, once every unit's bytes are on the disk."""
    plan, journal = run.plan, journal_of(run.plan.output)
    writer = ShardWriter(lambda name: locate(plan.output, name), plan.files)
    writer.prepare()
    try:
        finished = _verified(plan, writer, journal.entries())
        records = {name: entry.record for name, entry in finished.items() if entry.record is not None}
        todo = [unit for unit in plan.units if unit.tensor not in finished]
        run.reporter.start(plan, {name: entry.record for name, entry in finished.items()})

        def store(unit: Unit, converted: Converted) -> None:
            tensors = {**converted.backbone, **converted.adapter}
            writer.write(tensors)
            journal.add(Entry(unit.tensor, hash_tensors(tensors), converted.record))
            run.reporter.done(unit, converted.record)

        with ThreadPoolExecutor(max_workers=1) as writing:
            pending: Future[None] | None = None
            for unit, tensor in (_read_ahead if run.read_ahead else _read)(run.checkpoint, todo):
                run.reporter.working(unit)
                converted = _convert(unit, tensor, run)
                if converted.record is not None:
                    records[unit.tensor] = converted.record
                if pending is not None:
                    pending.result()  # one result in flight bounds the memory, and a failed write stops the run
                pending = writing.submit(store, unit, converted)
            if pending is not None:
                pending.result()
    finally:
        writer.close()
    return records


def _convert(unit: Unit, tensor: Tensor, run: Run) -> Converted:
    try:
        return convert(unit, tensor, run.plan.recipe, run.device, _moment(unit, run))
    except torch.OutOfMemoryError as error:
        raise LoftqError(
            f"{run.device} has too little memory for {unit.tensor} {list(unit.source.shape)}: free some, or run the "
            "same command with --device cpu; finished matrices are kept.",
            exit_code=ExitCode.INCOMPLETE,
        ) from error


def _moment(unit: Unit, run: Run) -> Tensor | None:
    """The second moment of what the matrix multiplies, where the recipe asks for calibration and it was seen."""
    if run.plan.moments is None or unit.matrix is None or unit.kind == "embedding":
        return None
    return open_moments(run.plan.moments).of(unit.matrix.module, run.plan.recipe.calibrate_kind)


def _read(checkpoint: Checkpoint, units: Sequence[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """Units with their tensors, one after the other."""
    for unit in units:
        yield unit, checkpoint.read(unit.tensor)


def _read_ahead(checkpoint: Checkpoint, units: Sequence[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """Units with their tensors; the next one is read while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as reading:
        ahead = reading.submit(checkpoint.read, units[0].tensor) if units else None
        for unit, following in zip(units, [*units[1:], None]):
            assert ahead is not None
            tensor = ahead.result()
            ahead = reading.submit(checkpoint.read, following.tensor) if following else None
            yield unit, tensor


def _verified(plan: Plan, writer: ShardWriter, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Journal entries whose bytes on the disk still hash to what was recorded."""
    units = {unit.tensor: unit for unit in plan.units}
    found = {}
    for name, entry in entries.items():
        if name not in units:
            continue
        tensors = {output.name: writer.read(output.name) for output in (*units[name].backbone, *units[name].adapter)}
        if hash_tensors(tensors) == entry.sha256:
            found[name] = entry
    return found


def _finish(run: Run, records: dict[str, MatrixRecord]) -> Manifest:
    """Everything but the weights, then the moves that make the directory a model."""
    plan, output = run.plan, run.plan.output
    run.reporter.finishing("checking files")
    for name, content in plan.texts.items():
        write_file(output, name, content)
    for side in plan.side_files:
        write_file(output, side.name, side.read())
    names = [*(file.name for file in plan.files), *plan.texts, *(side.name for side in plan.side_files)]
    files: dict[str, FileRecord] = {name: hash_file(locate(output, name)) for name in names}
    sizes = text_sizes(plan)
    seconds = time.perf_counter() - run.started
    manifest = build_manifest(plan, run.checkpoint.fingerprint, records, files, seconds, run.device)
    write_file(output, CARD, pad(render_card(manifest, plan), sizes.card))
    manifest = dataclasses.replace(manifest, files={**files, CARD: hash_file(locate(output, CARD))})
    write_file(output, MANIFEST, pad(render(manifest), sizes.manifest))
    publish(output, [*names, CARD, MANIFEST])
    run.reporter.finish(manifest)
    return manifest
