"""Commit finished units to the journal in groups, so that the time for flushing stays a fraction of the time for work.

A flush takes as long for a tiny matrix as for a large one, up to a second on a busy disk, and a unit needs one per file
that it touches and one for the journal. With a commit for every unit, a model with many small matrices (a mixture of
128 experts) would spend nearly all of its time waiting for the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from torch import Tensor

from loftq_cli.engine.output.journal import Entry, Journal
from loftq_cli.tensorfile.writer import ShardWriter

WORK_PER_FLUSH = 10.0  # seconds of work that are at stake for each second that a commit takes


class Commits:
    """Writes units and adds them to the journal once their bytes are on disk.

    A killed process loses the units since the last commit: at most `WORK_PER_FLUSH` times the duration of a commit in
    work, a few milliseconds on an idle disk, or `ShardWriter`'s limit of unflushed bytes. Leaving the context commits
    the rest, also after an error. Not safe for use by several threads at a time.
    """

    def __init__(self, writer: ShardWriter, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer, self._journal, self._clock = writer, journal, clock
        self._entries: list[Entry] = []
        self._last, self._cost, self._work = clock(), 0.0, 0.0

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.commit()
        except Exception:
            if error is None:  # otherwise the first error is the one to report
                raise

    def add(self, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        """Write a unit's tensors, and commit what has been written if it is time to."""
        self._writer.write(tensors)
        self._entries.append(entry)
        self._work += 0.0 if entry.record is None else entry.record.seconds
        at_stake = max(self._work, self._clock() - self._last)  # lanes work at the same time
        if at_stake >= WORK_PER_FLUSH * self._cost or not self._writer.unflushed:
            self.commit()

    def commit(self) -> None:
        """Flush the files, then list the units that have been written."""
        if not self._entries:
            return
        started = self._clock()
        entries, self._entries = self._entries, []  # a failed flush must not be tried again: it may claim success
        self._writer.flush()
        self._journal.add(*entries)
        self._last, self._work = self._clock(), 0.0
        self._cost = self._last - started
