"""`loftq_cli.batch`: convert many recipes, one or several at a time, and continue after failures."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.artifacts.manifest import NAME as MANIFEST
from loftq_cli.artifacts.manifest import read_manifest
from loftq_cli.batches.child import Children
from loftq_cli.batches.expand import Job, read_jobs
from loftq_cli.batches.report import BatchReport, Outcome, check_writable, junit, measured, write_report
from loftq_cli.errors import ExitCode, LoftqError, UsageError
from loftq_cli.machine.panics import is_panic
from loftq_cli.machine.printable import json_text

_GRACE = 60.0  # seconds between asking the processes to stop and killing them
_STATE_OF = {ExitCode.DONE: "done", ExitCode.INCOMPLETE: "incomplete", ExitCode.INTERRUPTED: "interrupted"}


class BatchReporter:
    """Receives the events of a batch and ignores them; subclasses show them. Called from several threads."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """These jobs are about to run."""

    def line(self, job: Job, text: str) -> None:
        """A job's process wrote a line to stderr."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job has ended."""


@dataclass(frozen=True)
class _Batch:
    """Settings that all jobs of a batch share."""

    children: Children
    reporter: BatchReporter
    stream: bool
    overwrite: bool
    dry_run: bool


def batch(
    files: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    jobs: int = 1,
    device: str = "auto",
    num_processes: int | None = None,
    max_memory: str | int | None = None,
    stream: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
    summary: str | Path | None = None,
    junit_file: str | Path | None = None,
    reporter: BatchReporter | None = None,
) -> BatchReport:
    """Convert every recipe in these YAML files, each in its own process.

    Conversions that are finished, with the same recipe and source, are skipped; unfinished ones are resumed; a failure
    does not stop the others. A file may hold lists under `matrix:`, which stand for all their combinations, and
    `output:` and `push_to:`.

    Args:
        files: YAML recipes.
        output: directory for recipes that do not name an output; the working directory by default.
        jobs: how many conversions run at the same time.
        device: as in `quantize`, for every recipe.
        num_processes: as in `quantize`, for every recipe.
        max_memory: as in `quantize`, for every recipe.
        stream: as in `quantize`, for every recipe.
        overwrite: as in `quantize`, for every recipe.
        dry_run: plan every recipe and convert none.
        verbose: report every matrix.
        summary: file for the report as JSON.
        junit_file: file for the report as JUnit XML.
        reporter: receives progress events; nothing is shown by default.

    Returns:
        The result of every recipe. After Ctrl-C, `interrupted` is set and all state is kept.

    Raises:
        UsageError: there are no files, two recipes share an output, or an argument is invalid.
    """
    if jobs < 1:
        raise UsageError(f"--jobs cannot be {jobs}: give a whole number of at least 1.")
    for path in (summary, junit_file):
        if path is not None:
            check_writable(Path(path))
    started, found = time.monotonic(), read_jobs(files, output)
    options = ["--device", device]
    for flag, value in (("--num-processes", num_processes), ("--max-memory", max_memory)):
        options += [] if value is None else [flag, str(value)]
    options += [flag for flag, on in (("--stream", stream), ("--overwrite", overwrite), ("--verbose", verbose)) if on]
    shared = _Batch(Children(options, jobs), reporter or BatchReporter(), stream, overwrite, dry_run)
    shared.reporter.begin(found)
    outcomes = _run_all(shared, found, 1 if dry_run else jobs)
    report = BatchReport(tuple(outcomes), round(time.monotonic() - started, 3), shared.children.stopping)
    if summary is not None:
        write_report(Path(summary), (json_text(report.as_dict()) + "\n").encode())
    if junit_file is not None:
        write_report(Path(junit_file), junit(report))
    return report


def _run_all(shared: _Batch, jobs: Sequence[Job], at_once: int) -> list[Outcome]:
    """Return the outcomes in the order of the jobs."""
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        futures = [pool.submit(_run, shared, job) for job in jobs]
        with _stopping(shared.children, futures):
            wait(futures)
        return [future.result() for future in futures]


@contextlib.contextmanager
def _stopping(children: Children, futures: Sequence[Future[Outcome]]) -> Iterator[None]:
    """On Ctrl-C (or SIGTERM, which the command line treats alike), ask every process to stop and give it time to save
    its state; a second Ctrl-C kills them at once."""
    try:
        yield
    except KeyboardInterrupt:
        children.interrupt()
        try:
            _, running = wait(futures, timeout=_GRACE)
        except KeyboardInterrupt:
            running = set(futures)
        if running:
            children.kill()
        wait(futures)


def _run(shared: _Batch, job: Job) -> Outcome:
    """Run one job and return its outcome; nothing is raised."""
    started = time.monotonic()
    blank = Outcome(job.name, str(job.file), str(job.output), "failed", push_to=job.push_to)
    try:
        if job.problem is not None:
            outcome = dataclasses.replace(blank, error=job.problem, exit_code=int(ExitCode.USAGE))
        elif shared.children.stopping:
            outcome = dataclasses.replace(blank, status="interrupted", error="not started")
        elif shared.dry_run:
            outcome = _plan(shared, job, blank)
        else:
            outcome = _convert(shared, job, blank)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        sentence = str(error) if isinstance(error, LoftqError) else f"unexpected {type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, LoftqError) else ExitCode.FAILED
        outcome = dataclasses.replace(blank, error=sentence, exit_code=int(code), status=_STATE_OF.get(code, "failed"))
    outcome = dataclasses.replace(outcome, seconds=round(time.monotonic() - started, 3))
    shared.reporter.ended(job, outcome)
    return outcome


def _convert(shared: _Batch, job: Job, blank: Outcome) -> Outcome:
    from loftq_cli.engine.output.directory import journal_of

    before = not shared.overwrite and _is_finished(shared, job)
    if before and job.push_to is None:
        return measured(dataclasses.replace(blank, status="finished"), read_manifest(job.output))
    resumed = not before and not shared.overwrite and journal_of(job.output).read_header() is not None
    ended = shared.children.run(job, lambda line: shared.reporter.line(job, line))
    outcome = dataclasses.replace(blank, exit_code=ended.exit_code, error=ended.error, resumed=resumed)
    if ended.exit_code == 0:
        outcome = dataclasses.replace(outcome, status="finished" if before else "done")
        return measured(outcome, read_manifest(job.output))
    if shared.children.stopping:
        return dataclasses.replace(outcome, status="interrupted")
    # A process that a signal terminated has kept its state, as one that exits with INCOMPLETE has.
    status = "incomplete" if ended.exit_code < 0 else _status(ended.exit_code)
    return dataclasses.replace(outcome, status=status)


def _status(exit_code: int) -> str:
    return _STATE_OF.get(ExitCode(exit_code), "failed") if exit_code in set(ExitCode) else "failed"


def _is_finished(shared: _Batch, job: Job) -> bool:
    """True if the output is complete and made from this recipe, so that no process is needed."""
    if not (job.output / MANIFEST).is_file():
        return False
    from loftq_cli.api import plan
    from loftq_cli.engine.output.finished import find_finished

    return find_finished(plan(output=job.output, stream=shared.stream, **job.recipe)) is not None


def _plan(shared: _Batch, job: Job, blank: Outcome) -> Outcome:
    from loftq_cli.api import plan

    made = plan(output=job.output, stream=shared.stream, **job.recipe)
    return dataclasses.replace(
        blank,
        status="planned",
        format=made.recipe.format,
        matrices=len(made.matrices),
        source_bytes=made.source_bytes,
        output_bytes=made.backbone_bytes + made.adapter_bytes,
        bits_effective=round(made.bits_effective, 4),
        bits_stored=round(made.bits_stored, 4),
    )
