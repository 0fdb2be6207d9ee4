"""Run a plan: claim the output, resume an earlier run, convert the rest, read it back and publish."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from loftq_cli.artifacts.card import render_card
from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord, parse_manifest, render, seal
from loftq_cli.artifacts.summary import CARD, build_manifest, pad, text_sizes
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.engine.compute.join_adapters import join_adapters
from loftq_cli.engine.compute.lanes import Schedule
from loftq_cli.engine.compute.pipeline import Run, run_stacks
from loftq_cli.engine.compute.stacks import Stack, form_stacks
from loftq_cli.engine.cost.memory import fits_a_lane, keeps_little
from loftq_cli.engine.cost.schedule import choose_schedule
from loftq_cli.engine.output.directory import (
    check_unchanged,
    claim,
    journal_of,
    on_file_error,
    on_full_disk,
    open_writer,
    publish,
    read_back,
    write_files,
)
from loftq_cli.engine.output.journal import Entry
from loftq_cli.engine.output.lock import Lock
from loftq_cli.engine.output.preflight import planned_bytes
from loftq_cli.engine.output.resume import resume_or_start
from loftq_cli.engine.output.source_sample import file_states, replaced_unit
from loftq_cli.engine.workers.supervisor import Team, supervise
from loftq_cli.errors import ExitCode, LoftqError
from loftq_cli.kernels import load_kernels
from loftq_cli.machine.memory import shared_memory
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.usage import Cost, own_cost
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit
from loftq_cli.progress import Reporter
from loftq_cli.tensorfile.hashing import FileRecord
from loftq_cli.tensorfile.writer import ShardWriter


@full_precision()
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
    """Carry out `plan`, resuming an earlier run, and return the manifest of the finished directory.

    Args:
        device: the device to compute on if this process works alone.
        max_memory: resident bytes to stay below; None allows reading ahead and converting several units at a time.
        team: other processes that do the work.

    Raises:
        UsageError: the output directory holds something else, or another run is writing it.
        LoftqError: the output could not be completed (`preflight.planned_bytes`).
        LoftqError: a weight cannot be converted; the disk is full, a worker died, or a file does not read back as it
            was written (exit code 4: the same command resumes).
    """
    if team is None:
        load_kernels(plan.grids, device)  # counts as startup, like importing torch
    started = time.perf_counter()
    run = Run(plan, checkpoint, device, reporter, choose_schedule(plan, device, max_memory))
    needed = planned_bytes(plan)
    prepare = partial(resume_or_start, plan, checkpoint, overwrite, reporter, needed)
    claimed = claim(plan.output, {"the model": plan.source}, prepare)
    with on_file_error(), on_full_disk(plan.output), team or nullcontext(), claimed as lock:
        try:
            small = write_files(plan.output, plan.texts, plan.side_files)  # fails now rather than after the work
            states = file_states(checkpoint)
            finished = _prepare(run)
            records, cost = _convert_rest(run, finished, lock, team)
            _check_source(run, states)
            joined = _join(plan)
            cost = dataclasses.replace(cost, seconds=time.perf_counter() - started)
            return _finish(run, records, joined, small, cost, lock)
        finally:
            reporter.close()


def _prepare(run: Run) -> dict[str, Entry]:
    """Create the files, and return the units that an earlier run finished: their bytes have the recorded hashes."""
    plan, entries = run.plan, journal_of(run.plan.output).entries()
    with open_writer(plan.output, plan.written_files, create=True) as writer:
        units = [unit for unit in plan.units if unit.tensor in entries]
        found = {unit.tensor: entries[unit.tensor] for unit in units if _is_written(unit, entries[unit.tensor], writer)}
    run.reporter.start(plan, {name: entry.record for name, entry in found.items()})
    return found


def _is_written(unit: Unit, entry: Entry, writer: ShardWriter) -> bool:
    return all(writer.hash(output.name) == entry.hashes.get(output.name) for output in (*unit.backbone, *unit.adapter))


def _convert_rest(
    run: Run, finished: Mapping[str, Entry], lock: Lock, team: Team | None
) -> tuple[dict[str, MatrixRecord], Cost]:
    """Convert all other units; return the records of all matrices by tensor name, and the cost."""
    records = {name: entry.record for name, entry in finished.items() if entry.record is not None}
    todo = form_stacks(run.plan.units, run.plan.recipe, run.schedule.stack, finished)
    if team is not None:
        fresh, cost = supervise(run.plan, team, todo, run.reporter, lock)
        return {**records, **fresh}, cost
    with open_writer(run.plan.output, run.plan.written_files) as writer:
        journal = journal_of(run.plan.output)
        for schedule, stacks in by_size(run, todo):
            with shared_memory(keeps=schedule.keeps_memory):
                scheduled = dataclasses.replace(run, schedule=schedule)
                records |= run_stacks(scheduled, _while_owned(lock, stacks), writer, journal)
    return records, own_cost(run.device)


def _check_source(run: Run, states: Mapping[str, str]) -> None:
    """Check that the source still holds what was converted, if a file has changed during the run.

    Raises:
        LoftqError: it does not (exit code 4).
    """
    plan = run.plan
    if file_states(run.checkpoint) == states:
        return
    replaced = replaced_unit(plan.units, journal_of(plan.output).entries(), run.checkpoint, run.reporter)
    if replaced is not None:
        raise LoftqError(
            f"{plan.source / replaced.source.file} was changed while it was converted ({replaced.tensor} differs): "
            "restore it and run the same command again, or give --overwrite to start again.",
            exit_code=ExitCode.INCOMPLETE,
        )


def _join(plan: Plan) -> dict[str, str]:
    """Join the tensors in the scratch file; return the sha256 of each joined tensor."""
    if plan.scratch is None:
        return {}
    with open_writer(plan.output, plan.written_files) as writer:
        return join_adapters(plan, writer)


def _while_owned(lock: Lock, stacks: Iterable[Stack]) -> Iterator[Stack]:
    for stack in stacks:
        lock.check()
        yield stack


def by_size(run: Run, stacks: Sequence[Stack]) -> list[tuple[Schedule, list[Stack]]]:
    """Sort stacks by schedule: first those that share the machine, small before larger ones, then those that are
    converted alone with all threads."""
    small, middle, large, method = list[Stack](), list[Stack](), list[Stack](), run.plan.recipe.method
    for stack in stacks:
        little = all(keeps_little(unit, method) for unit in stack.units)
        shares = all(fits_a_lane(unit, method) for unit in stack.units)
        (small if little else middle if shares else large).append(stack)
    fresh = dataclasses.replace(run.schedule, keeps_memory=False)
    return [(run.schedule, small), (fresh, middle), (dataclasses.replace(fresh, lanes=1), large)]


def _finish(
    run: Run,
    records: Mapping[str, MatrixRecord],
    joined: Mapping[str, str],
    small: Mapping[str, FileRecord],
    cost: Cost,
    lock: Lock,
) -> Manifest:
    """Read back what was written, write the card and the manifest, and publish all files.

    Args:
        small: records of the files beside the weights that have been written already.
    """
    plan, output = run.plan, run.plan.output
    run.reporter.finishing("reading back what was written")
    files = read_back(output, plan.files, {**_written_hashes(plan), **joined})
    check_unchanged(output, small)
    files |= small
    sizes = text_sizes(plan)
    manifest = build_manifest(plan, run.checkpoint.fingerprint, records, files, cost)
    files |= write_files(output, {CARD: pad(render_card(manifest, plan), sizes.card)})
    sealed = seal(pad(render(dataclasses.replace(manifest, files=files)), sizes.manifest))
    write_files(output, {MANIFEST: sealed})
    lock.check()
    publish(output, [*files, MANIFEST])
    manifest = parse_manifest(output / MANIFEST, sealed)
    run.reporter.finish(manifest)
    return manifest


def _written_hashes(plan: Plan) -> dict[str, str]:
    """Return the sha256 of every tensor that units have written."""
    entries = journal_of(plan.output).entries()
    return {name: digest for entry in entries.values() for name, digest in entry.hashes.items()}
