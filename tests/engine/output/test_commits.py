"""Finished units reach the disk in groups: flushes take a share of the time, not one per matrix."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES

import loftq_cli
from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.engine.compute import pipeline
from loftq_cli.engine.output.commits import Commits
from loftq_cli.engine.output.journal import Entry, Journal
from loftq_cli.tensorfile import writer as files
from loftq_cli.tensorfile.layout import lay_out
from loftq_cli.tensorfile.tensors import OutputTensor
from loftq_cli.tensorfile.writer import ShardWriter

HASH = "0" * 64
RECORD = MatrixRecord(
    tensor="m",
    module="m",
    kind="linear",
    parameter="",
    expert=None,
    shape=(1, 4),
    bits=2,
    data_type="nf",
    block_size=64,
    layout="rows",
    scale_dtype="float32",
    value_dtype="float32",
    rank=1,
    plain_residual=0.5,
    residual=0.4,
    residuals=(0.4,),
    best=1,
    seconds=0.0,
    backbone_bytes=4,
    adapter_bytes=0,
)


class Disk:
    """A clock that only the disk and the work move on."""

    def __init__(self, flush_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.flushes, self._seconds, self.events = 0.0, 0, flush_seconds, list[str]()
        monkeypatch.setattr(files, "_flush", lambda handle: self._sync("data"))
        monkeypatch.setattr(os, "fsync", lambda handle: self._sync("journal"))

    def _sync(self, kind: str) -> None:
        self.now, self.flushes = self.now + self._seconds, self.flushes + 1
        self.events.append(kind)


def open_units(tmp_path: Path, count: int) -> tuple[ShardWriter, list[OutputTensor]]:
    planned = [OutputTensor(f"m{number}", torch.uint8, (4,)) for number in range(count)]
    writer = ShardWriter(lambda name: tmp_path / name, (lay_out("model.safetensors", planned, {}),))
    writer.prepare()
    return writer, planned


def flushes(tmp_path: Path, units: int, work: float, flush: float, monkeypatch: pytest.MonkeyPatch) -> int:
    tmp_path.mkdir()
    writer, planned = open_units(tmp_path, units)
    disk, journal = Disk(flush, monkeypatch), Journal(tmp_path / "journal")
    with Commits(writer, journal, lambda: disk.now) as group:
        for tensor in planned:
            disk.now += work
            group.add(Entry(tensor.name, {tensor.name: HASH}, None), {tensor.name: torch.ones(4, dtype=torch.uint8)})
    assert set(journal.entries()) == {tensor.name for tensor in planned}
    return disk.flushes


def test_flushes_take_a_fraction_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """528 matrices of 10 ms on a disk that takes 0.65 s to flush used to spend 690 s on it, for 5 s of work."""
    slow = flushes(tmp_path / "slow", 528, 0.01, 0.65, monkeypatch)
    assert slow <= 6
    assert flushes(tmp_path / "more", 2 * 528, 0.01, 0.65, monkeypatch) <= 2 * slow
    # Large matrices are committed one by one, so that a kill repeats no more than that.
    assert flushes(tmp_path / "large", 10, 100.0, 0.65, monkeypatch) == 20


def test_work_of_a_lane_counts_even_right_after_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, planned = open_units(tmp_path, 3)
    disk, journal = Disk(1.0, monkeypatch), Journal(tmp_path / "journal")
    group = Commits(writer, journal, lambda: disk.now)

    def add(number: int, seconds: float) -> set[str]:
        name = planned[number].name
        record = dataclasses.replace(RECORD, seconds=seconds)
        group.add(Entry(name, {name: HASH}, record), {name: torch.ones(4, dtype=torch.uint8)})
        return set(journal.entries())

    assert add(0, 0.1) == {"m0"}
    assert add(1, 0.1) == {"m0"}
    assert add(2, 600.0) == {"m0", "m1", "m2"}


def test_the_journal_never_lists_what_was_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, planned = open_units(tmp_path, 4)
    journal = Journal(tmp_path / "journal")

    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"), Commits(writer, journal) as group:
        for number, tensor in enumerate(planned):
            if number == 2:
                monkeypatch.setattr(files, "_flush", fails)
            group.add(Entry(tensor.name, {tensor.name: HASH}, None), {tensor.name: torch.ones(4, dtype=torch.uint8)})
            group.commit()
        pytest.fail("the flush failed")
    monkeypatch.undo()
    assert set(journal.entries()) == {"m0", "m1"}


def test_a_flush_that_failed_within_a_write_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports lost pages once: the next flush of the same file succeeds."""
    writer, planned = open_units(tmp_path, 3)
    disk, journal = Disk(1000.0, monkeypatch), Journal(tmp_path / "journal")
    answers = iter([OSError(5, "Input/output error"), None, None, None])

    def fails_once(handle: int) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    group = Commits(writer, journal, lambda: disk.now)
    monkeypatch.setattr(files, "_MOST_UNFLUSHED", 8)
    monkeypatch.setattr(files, "_flush", fails_once)
    with pytest.raises(OSError, match="Input/output"), group:
        group._cost = 1.0  # so that the first unit waits for the second
        for tensor in planned:
            group.add(Entry(tensor.name, {tensor.name: HASH}, None), {tensor.name: torch.ones(4, dtype=torch.uint8)})
        pytest.fail("the flush failed")
    assert not journal.entries()


def test_finished_units_are_kept_after_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, planned = open_units(tmp_path, 3)
    disk, journal = Disk(100.0, monkeypatch), Journal(tmp_path / "journal")
    with pytest.raises(KeyboardInterrupt), Commits(writer, journal, lambda: disk.now) as group:
        for tensor in planned:
            group.add(Entry(tensor.name, {tensor.name: HASH}, None), {tensor.name: torch.ones(4, dtype=torch.uint8)})
        raise KeyboardInterrupt
    assert set(journal.entries()) == {"m0", "m1", "m2"} and disk.events == ["data", "journal"] * 2


def test_a_commit_comes_with_every_64_mebibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_UNFLUSHED", 8)
    writer, planned = open_units(tmp_path, 5)
    disk, journal = Disk(1000.0, monkeypatch), Journal(tmp_path / "journal")
    group = Commits(writer, journal, lambda: disk.now)
    seen = []
    for tensor in planned:
        group.add(Entry(tensor.name, {tensor.name: HASH}, None), {tensor.name: torch.ones(4, dtype=torch.uint8)})
        seen.append(len(journal.entries()))
    assert seen == [1, 1, 3, 3, 5]


def test_more_experts_need_no_more_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole conversion on a disk that takes 1000 s to flush: as many flushes for 16 experts as for 4."""
    import transformers

    family = FAMILIES["mistral4"]
    cls = getattr(transformers, family.model_class)
    counts = []
    for experts in (4, 16):
        source = tmp_path / f"source{experts}"
        cls(cls.config_class(**{**family.config, "n_routed_experts": experts})).save_pretrained(source)
        with monkeypatch.context() as patch:
            disk = Disk(1000.0, patch)
            patch.setattr(pipeline, "Commits", functools.partial(Commits, clock=lambda disk=disk: disk.now))
            manifest = loftq_cli.quantize(source, output=tmp_path / f"out{experts}", bits=2, rank=4, iters=1)
        assert len(manifest.matrices) == 4 * experts + 16
        counts.append(disk.flushes)
    assert counts[0] == counts[1] < 40
