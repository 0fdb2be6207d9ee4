"""Run cases in this process and judge how they end."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import os
import random
import shutil
import socketserver
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer.testing

from loftq_cli.cli import app
from support.fuzzing import (
    adapter_kinds,
    batch_kinds,
    convert_kinds,
    output_kinds,
    resume_kinds,
)
from support.fuzzing.case import FLAGS, Case
from support.fuzzing.hub import publish
from support.fuzzing.judge import judge, snapshot
from support.fuzzing.outputs import Outputs
from support.fuzzing.sources import Sources
from support.fuzzing.watch import Clock, Hang, Memory, Watch, deadline
from support.hub_server import HubServer

SECONDS = 10
MOST_MEMORY = 300_000_000  # bytes that a case of less than a megabyte may take

KINDS: dict[str, tuple[int, Callable[[Case, Sources, Outputs], None]]] = {
    "config": (6, convert_kinds.some_config),
    "header": (6, convert_kinds.some_header),
    "index": (4, convert_kinds.some_index),
    "weights": (4, convert_kinds.some_weights),
    "pickle": (6, convert_kinds.some_pickle),
    "meta": (4, convert_kinds.some_meta),
    "files": (4, convert_kinds.some_files),
    "side file": (2, convert_kinds.some_side_file),
    "recipe": (4, convert_kinds.some_recipe),
    "output": (3, resume_kinds.some_output),
    "overwrite": (4, resume_kinds.some_overwrite),
    "resume": (14, resume_kinds.some_resume),
    "resumed merge": (3, resume_kinds.some_resumed_merge),
    "half an output": (3, resume_kinds.some_look_at_half),
    "worker": (3, resume_kinds.some_order),
    "merge": (14, adapter_kinds.some_merge),
    "inspect": (5, output_kinds.some_inspect),
    "verify": (7, output_kinds.some_verify),
    "verify source": (8, output_kinds.some_verify_source),
    "eval": (6, output_kinds.some_eval),
    "push": (7, output_kinds.some_push),
    "batch": (7, batch_kinds.some_batch),
}
STREAMED = ("config", "header", "index", "pickle", "meta")  # kinds that are also put on the Hub


@dataclass
class Outcome:
    """How a case ended; `findings` is empty where everything is as it should be."""

    number: int
    kind: str
    code: int
    said: str
    seconds: float
    findings: list[str] = field(default_factory=list)
    command: str = ""
    damage: str = ""
    grown: int = 0


class Fuzzer:
    """Runs cases below `root`; `hub` serves those that are streamed."""

    def __init__(self, root: Path, seed: int, hub: HubServer | None = None) -> None:
        self.root, self.seed, self.hub = root.resolve(), seed, hub
        for folder in (self.root, self.root / "sound", self.root / "tmp"):
            folder.mkdir(exist_ok=True)
        self.sources = Sources(self.root / "sound")
        with _quick(self.root / "tmp"):
            self.outputs = Outputs(self.root / "outputs", self.sources)
            self._warm_up()
        self.watch = Watch.get()

    def run(self, number: int, *, keep: bool = False) -> Outcome:
        """Case `number` of this seed."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        case = Case(self.root / f"case{number}", rng)
        case.root.mkdir()
        (case.root / "outside.txt").write_bytes(b"private")
        KINDS[kind][1](case, self.sources, self.outputs)
        model = str(case.source)
        if self.hub is not None and kind in STREAMED and rng.random() < 0.25:
            kind, model = f"{kind} streamed", publish(self.hub, rng, case.source)
            case.words.append("--stream")
        if case.command == "quantize" and "--overwrite" not in case.words and rng.random() < 0.1:
            case.command = "plan"
        there = case.out.exists()
        if case.out.is_dir():
            case.before = {path.name for path in case.out.iterdir()}
        kept = (case.out, case.root / "nowhere")
        before = snapshot(case.root, *kept)
        with _quick(self.root / "tmp"):
            outcome = self._invoke(case, case.command_line(model))
        outcome.number, outcome.kind, outcome.command, outcome.damage = number, kind, case.command, case.damage
        if case.command == "plan" and case.out.exists() and not there:
            outcome.findings.append("a plan wrote something")
        outcome.findings += _changes(before, snapshot(case.root, *kept))
        outcome.findings += [f"left {path.name} in the temporary folder" for path in (self.root / "tmp").iterdir()]
        shutil.rmtree(self.root / "tmp")
        (self.root / "tmp").mkdir()
        if not keep:
            shutil.rmtree(case.root, ignore_errors=True)
        return outcome

    def _warm_up(self) -> None:
        """What is imported and compiled at the first run of a process is not a case's doing."""
        text, packed = self.root / "text.txt", str(self.outputs.root / "finished" / "packed")
        text.write_text("a b c d e f g h " * 8)
        lines = [
            *(["quantize", str(self.sources.root / name), "-o", str(self.root / f"warm-{name}"), *FLAGS]
              for name in ("bin", "legacy", "meta", "fp8", "mixtral", "gpt2", "bert", "t5")),
            ["eval", packed, "--text", str(text), "--device", "cpu"],
            ["verify", packed, "--source", str(self.outputs.model)],
            ["push", packed, "a/b", "--dry-run"],
            ["merge", *map(str, self.outputs.merge_words("packed")), "-o", str(self.root / "m"), "--to", "requantize"],
            ["merge", *map(str, self.outputs.merge_words("qalora")), "-o", str(self.root / "g"), "--to", "gguf"],
        ]  # fmt: skip
        for words in lines:
            result = typer.testing.CliRunner().invoke(app, words)
            assert result.exit_code == 0, (words, result.output, result.exception)

    def _invoke(self, case: Case, words: list[str]) -> Outcome:
        cache = Path(os.environ["HF_HOME"]) if self.hub is not None else self.root / "cache"
        allowed = [case.out, case.root / "nowhere", Path(os.environ["XDG_CACHE_HOME"]), cache, self.root / "tmp"]
        memory, clock = Memory(), Clock()
        call = _work_off if case.command == "worker" else typer.testing.CliRunner().invoke
        given: Any = (case,) if case.command == "worker" else (app, words)
        folder = case.out if case.command.startswith("batch") else self.root
        with (
            _in_folder(folder),
            self.watch.watching(*allowed) as seen,
            deadline(SECONDS),
            batch_kinds.in_this_process(),
        ):
            try:
                result = call(*given)
            except Hang as hang:
                where = "".join(traceback.format_tb(hang.__traceback__)[-6:])
                return Outcome(0, "", -1, "", clock.seconds(), [f"hangs:\n{where}"])
        outcome = Outcome(0, "", result.exit_code, result.stderr.strip(), clock.seconds())
        outcome.grown = memory.growth()
        outcome.findings += seen
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            shown = "".join(traceback.format_exception(result.exception)[-6:])
            hangs = isinstance(result.exception, Hang)
            outcome.findings.append(f"{'hangs' if hangs else 'traceback'}:\n{shown}")
        if outcome.grown > MOST_MEMORY:
            outcome.findings.append(f"takes {outcome.grown / 1e6:.0f} MB of memory")
        outcome.findings += judge(case, result.exit_code, result.stderr, result.stdout)
        return outcome


@dataclass(frozen=True)
class _Result:
    exit_code: int
    stderr: str
    stdout: str
    exception: BaseException | None = None


def _work_off(case: Case) -> _Result:
    """Do what a worker's process does with its order."""
    from loftq_cli.engine.workers.order import Order
    from loftq_cli.engine.workers.worker import carry_out
    from loftq_cli.errors import LoftqError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            try:
                order = Order.from_json((case.root / "order.json").read_bytes().decode("utf-8", "surrogateescape"))
            except LoftqError as error:
                return _Result(int(error.exit_code), f"loftq: {error}", "")
            return _Result(int(carry_out(order)), said.getvalue(), "")
    except BaseException as error:
        return _Result(-1, said.getvalue(), "", error)
    finally:
        torch.set_num_threads(1)


@contextlib.contextmanager
def _quick(folder: Path) -> Any:
    """Temporary files go where they are watched, and nothing waits for the disk."""
    version = functools.cache(importlib.metadata.version)  # which parses a file of each package
    with (
        mock.patch.object(tempfile, "tempdir", str(folder)),
        mock.patch.object(os, "fsync", lambda handle: None),
        mock.patch.object(importlib.metadata, "version", version),
        # The Hub on loopback prints when a client hangs up, and it prints into what the command says.
        mock.patch.object(socketserver.BaseServer, "handle_error", lambda *_: None),
    ):
        yield


@contextlib.contextmanager
def _in_folder(folder: Path) -> Any:
    """Names that are relative mean files in this folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _changes(before: dict[str, object], now: dict[str, object]) -> list[str]:
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [f"changed outside of the output: {', '.join(different)}"] if different else []
