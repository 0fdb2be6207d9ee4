"""Kill conversions at random moments (SIGKILL) until each is finished; every output must equal that of an
uninterrupted run, byte for byte, and config.json must not exist before the end.

    python scripts/soak/kills.py path/to/model --kills 100

Conversions run in forks of this process, which has imported everything, so that most kills hit work and not imports.
Some of them work on one matrix at a time and some on two, by chance.
With two workers the victim is the main process or a worker, by chance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

import loftq_cli
from loftq_cli.errors import LoftqError

FORMATS = ({"format": "packed", "bits": 2}, {"format": "bnb", "bits": 4}, {"format": "dense", "bits": 3})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--share", type=float, default=0.25, help="of the kills that goes to more than one worker")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks do not inherit threads
    rng = random.Random(options.seed)
    print(f"seed {options.seed}, {options.model}")
    many = round(options.kills * options.share) if max(options.workers) > 1 and 1 in options.workers else 0
    with tempfile.TemporaryDirectory() as folder:
        # Once here, so that the forks have imported and compiled everything.
        loftq_cli.quantize(options.model, output=Path(folder) / "warm", bits=2, rank=8, device="cpu")
        for workers in options.workers:
            kills = options.kills - many if workers == 1 else many or options.kills
            for index, recipe in enumerate(FORMATS):
                part = kills // len(FORMATS) + (index < kills % len(FORMATS))
                soak(options.model, Path(folder), dict(recipe, rank=8, max_shard_size="1MB"), workers, part, rng)
    print("all outputs byte-identical, config.json never early")


def soak(model: Path, folder: Path, recipe: dict, workers: int, kills: int, rng: random.Random) -> None:
    """Kill until `kills` signals have hit a running process, then let it finish; compare every finished output."""
    reference, out = folder / "reference", folder / "out"
    started = time.perf_counter()
    process = start(model, reference, recipe, workers)
    assert os.waitpid(process, 0)[1] == 0, "the uninterrupted run failed"
    length = time.perf_counter() - started
    expected, outputs, hits = contents(reference), 0, 0
    while hits < kills:
        hits += one_kill(model, out, recipe, workers, rng, length)
        if (out / "config.json").exists():
            outputs += 1
            finish(out, model, recipe, workers, expected)
    if out.exists():
        outputs += 1
        finish(out, model, recipe, workers, expected)
    shutil.rmtree(reference)
    print(
        f"{recipe['format']:7} {workers} worker(s): {hits} kills, {outputs} outputs of {length:.1f} s, identical",
        flush=True,
    )


def one_kill(model: Path, out: Path, recipe: dict, workers: int, rng: random.Random, length: float) -> bool:
    """Return True if the process was killed before it ended by itself."""
    process = start(model, out, recipe, workers)
    time.sleep(rng.uniform(0, length))
    victims = [process, *children(process)]
    victim = rng.choice(victims)
    done, _ = os.waitpid(process, os.WNOHANG)
    if done:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (-signal.SIGKILL, 0, 4), f"the run ended with {code}"
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in victims) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(psutil.pid_exists(pid) for pid in victims), "a worker outlived its run"
    if (out / "config.json").exists():  # the kill came after the last rename
        assert loftq_cli.verify(out).ok
    return True


def finish(out: Path, model: Path, recipe: dict, workers: int, expected: dict[str, bytes]) -> None:
    """Let the run finish and compare its output."""
    if not (out / "config.json").exists() or (out / ".loftq").exists():  # killed before the state was removed
        code = os.waitstatus_to_exitcode(os.waitpid(start(model, out, recipe, workers), 0)[1])
        assert code == 0, f"the resumed run ended with {code}"
    found = contents(out)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert loftq_cli.verify(out).ok and not different, f"{out}: other {different}"
    shutil.rmtree(out)


def start(model: Path, out: Path, recipe: dict, workers: int) -> int:
    """Start a process that converts as `loftq quantize` does and exits with its code."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1 + os.getpid() % 2)  # one matrix at a time, or two
        loftq_cli.quantize(model, output=out, num_processes=workers, device="cpu", **recipe)
        code = 0
    except LoftqError as error:
        code = int(error.exit_code)
        if code not in (0, 4):
            print(error, file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def children(process: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(process).children()]
    return []


def contents(path: Path) -> dict[str, bytes]:
    """Return every file except the two that contain timings, and the manifest's matrices without their seconds."""
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    manifest = json.loads(files["loftq.json"])
    residuals = [[m["tensor"], m["residual"], m["residuals"]] for m in manifest["matrices"]]
    names = json.dumps([sorted(files), residuals]).encode()
    # The adapter's config and the recipe name directories, which differ on purpose.
    weights = {name: content for name, content in files.items() if name.endswith(".safetensors")}
    return {**weights, "config.json": files["config.json"], "names and residuals": names}


if __name__ == "__main__":
    main()
