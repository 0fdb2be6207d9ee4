"""Cases of `batch`: YAML with several recipes, of which some are odd, hostile or damaged."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import typer.testing

from loftq_cli.batches.child import Children, Ended
from loftq_cli.batches.expand import Job
from loftq_cli.cli import app
from support.fuzzing.case import Case
from support.fuzzing.damage import damage_bytes
from support.fuzzing.outputs import Outputs
from support.fuzzing.recipe_text import RECIPES, YAML_VALUES, bomb
from support.fuzzing.sources import Sources

_LINES = (
    "matrix: {w}", "matrix:\n  bits: {w}", "matrix:\n  rank: [2, {w}]", "matrix:\n  {w}: [1, 2]", "output: {w}",
    "push_to: {w}", "output: '{w}/{model}-{bits}'", "name: {w}", *RECIPES,
)  # fmt: skip
_PLACES = (
    "'{name:>999999999}'", "'{bits.__class__}'", "'{0}'", "'{'", "'../../outside.txt'", "/etc/x", "'~nobody/x'",
    "'a\\0b'", "\"\\x1b[31mx\"", "\"\\u202ex\"", "'" + "a/" * 3000 + "'", "'{bits!r:>{bits}}'", "'[red]x[/]'", "''",
)  # fmt: skip

_ELSEWHERE = ("../..", "/etc/x", "~nobody", "a/a/")


def some_batch(case: Case, sources: Sources, outputs: Outputs) -> None:
    rng = case.rng
    files, everywhere = [], False
    for i in range(rng.choice((1, 1, 2))):
        path = case.root / f"{rng.choice(('a', 'b', '[x]', 'c d'))}{i}.yaml"
        path.write_bytes(text := _text(rng, outputs, case))
        everywhere = everywhere or any(place.encode() in text for place in _ELSEWHERE)
        files.append(str(path))
    if rng.random() < 0.1:
        files.append(str(case.root / rng.choice(("missing.yaml", "outside.txt", "..", "*.yaml"))))
    case.out.mkdir()
    case.command, case.damage = "batch --dry-run", "YAML"
    case.words = [*files, "-o", str(case.out / "all"), "--device", "cpu", "--quiet"]
    if rng.random() < 0.3 and not everywhere:  # a recipe says where to write
        case.command = "batch"
    if rng.random() < 0.5:
        case.words += ["--summary", str(case.out / "summary.json"), "--junit", str(case.out / "junit.xml")]
    case.source.mkdir()


def _text(rng: random.Random, outputs: Outputs, case: Case) -> bytes:
    lines = [f"model: {outputs.model}", "rank: 2", "iters: 1", "block_size: 32"]
    if rng.random() < 0.4:
        lines.append("matrix:\n  bits: [2, 4]")
    for _ in range(rng.choice((0, 1, 1, 2))):
        value = rng.choice((*YAML_VALUES, *_PLACES))
        value = value.replace("{mark}", str(case.mark)).replace("{{", "{").replace("}}", "}")
        lines.append(rng.choice(_LINES).replace("{w}", value))
    rng.shuffle(lines)
    content = "\n".join(lines)
    if rng.random() < 0.05:
        names = ("bits", "rank", "iters", "seed", "alpha", "block_size")
        content += "\nmatrix:\n" + "\n".join(f"  {name}: [{', '.join(['2'] * 90)}]" for name in names)
    if rng.random() < 0.05:
        content = bomb()
    data = content.encode("utf-8", "surrogatepass")
    return damage_bytes(rng, data) if rng.random() < 0.15 else data


@contextmanager
def in_this_process() -> Iterator[None]:
    """Let a batch run its conversions in this process, which is watched and needs no start."""
    lock = threading.Lock()

    def run(children: Any, job: Job, on_line: Callable[[str], None]) -> Ended:
        from loftq_cli.batches.child import _error, _yaml

        path = job.output.parent / f"{job.output.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_yaml(job), encoding="utf-8")
        words = ["quantize", "--config", str(path), "-o", str(job.output), *children._options]
        with lock:
            result = typer.testing.CliRunner().invoke(app, words)
        lines = [line for line in result.stderr.splitlines() if line]
        for line in lines:
            on_line(line)
        return Ended(result.exit_code, _error(result.exit_code, lines[-20:]))

    with mock.patch.object(Children, "run", run):
        yield
