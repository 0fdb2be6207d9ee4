"""Cases of commands on outputs that are half done, or in the way."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from support.fuzzing import state_damage
from support.fuzzing.case import Case
from support.fuzzing.damage import damage_json
from support.fuzzing.damage_files import damage_files
from support.fuzzing.output_kinds import odd_file_names, reseal
from support.fuzzing.outputs import SHARDS, Outputs
from support.fuzzing.sources import Sources
from support.fuzzing.state_damage import state_of

_OF_MERGES = (
    state_damage.mark, state_damage.mark, state_damage.links, state_damage.locks, state_damage.beside,
    state_damage.shards,
)  # fmt: skip
_OF_HALVES = (state_damage.links, state_damage.journal, state_damage.shards, state_damage.undamaged)


def some_resume(case: Case, sources: Sources, outputs: Outputs) -> None:
    """A conversion that goes on from a damaged state."""
    rng, stage = case.rng, case.rng.choice(("units", "units", "all units", "publishing"))
    shutil.copytree(outputs.model, case.source)
    shutil.copytree(outputs.root / "half" / stage, case.out)
    case.reference, case.origin = dict(outputs.reference), case.source
    case.damage = f"state: {rng.choice(state_damage.DAMAGES)(case)}"
    case.words = list(SHARDS)
    if rng.random() < 0.15:
        case.words.append("--overwrite")
    if rng.random() < 0.05:
        case.words, case.reference = ["--rank", "4", *SHARDS], {}


def some_resumed_merge(case: Case, sources: Sources, outputs: Outputs) -> None:
    """A merge that is repeated after it stopped half-way."""
    backbone, adapter = outputs.merge_words("packed")
    shutil.copytree(backbone, case.source)
    shutil.copytree(adapter, case.root / "adapter")
    shutil.copytree(outputs.root / "half" / "merge", case.out)
    case.reference = {"model.safetensors": hashlib.sha256(_merged(outputs)).hexdigest()}
    case.damage = f"half a merge: {case.rng.choice(_OF_MERGES)(case)}"
    case.command = "merge"
    case.words = [str(case.source), str(case.root / "adapter"), "-o", str(case.out)]
    case.words += case.rng.choice(([], ["--overwrite"]))


def some_look_at_half(case: Case, sources: Sources, outputs: Outputs) -> None:
    """Other commands on half an output."""
    stage = case.rng.choice(("units", "all units", "publishing", "merge"))
    shutil.copytree(outputs.root / "half" / stage, case.source)
    damage = case.rng.choice(_OF_HALVES)
    out = case.root / "out"
    out.symlink_to(case.source)  # the damages are of `out`
    case.damage = f"half an output: {damage(case)}"
    out.unlink()
    text = case.root / "text.txt"
    text.write_text("a b c d e f g h " * 9)
    words = {
        "inspect": [],
        "verify": [],
        "verify --source": [],
        "push --dry-run": ["some-org/pushed"],
        "eval": ["--text", str(text), "--device", "cpu"],
    }
    case.command = case.rng.choice(sorted(words))
    case.words = [str(case.source), *words[case.command]]
    if case.command == "verify --source":
        case.words.insert(0, str(outputs.model))


def some_overwrite(case: Case, sources: Sources, outputs: Outputs) -> None:
    """`--overwrite` of a finished output whose manifest, files or folders are damaged."""
    rng = case.rng
    shutil.copytree(outputs.model, case.source)
    shutil.copytree(outputs.root / "whole", case.out)
    (case.out / "mine.txt").write_bytes(b"private")
    how = rng.randrange(4)
    if how == 0:
        reseal(case.out, lambda values: odd_file_names(rng, values, case.root))
        case.damage = "finished output: odd file names"
    elif how == 1:
        path = case.out / "loftq.json"
        path.write_bytes(damage_json(rng, path.read_bytes()))
        case.damage = "finished output: manifest"
    elif how == 2:
        case.damage = f"finished output: {damage_files(rng, case.out)}"
    else:
        (case.out / "mine.txt").unlink()
        case.damage = "finished output: none"
    case.words = [*SHARDS, *(["--overwrite"] if rng.random() < 0.8 else [])]
    case.reference, case.origin = dict(outputs.reference), case.source


def some_output(case: Case, sources: Sources, outputs: Outputs) -> None:
    """Output directories that are something else."""
    shutil.copytree(sources.root / "tiny", case.source)
    how = case.rng.randrange(9)
    case.damage = "output: something else"
    if how == 0:
        case.out.write_bytes(b"x")
    elif how == 1:
        case.out.mkdir()
        (case.out / "mine.txt").write_bytes(b"x")
    elif how == 2:
        case.out.symlink_to(case.source)
    elif how == 3:
        (case.out / ".loftq").mkdir(parents=True)
        (case.out / ".loftq" / "journal").write_bytes(
            case.rng.choice(
                (b"", b"{}\n", b"[]\n", b'{"recipe": 3, "fingerprint": 4}\n', b"\xff\n", b'{"tensor": []}\n')
            )
        )
    elif how == 4:
        case.out.mkdir()
        (case.out / "loftq.json").write_bytes(
            case.rng.choice((b"", b"{}", b"[]", b'{"manifest_version": "x"}', b"null"))
        )
        case.words += ["--overwrite"] if case.rng.random() < 0.5 else []
    elif how == 5:
        case.out.symlink_to(case.root / "nowhere" / "at all")
    elif how == 6:
        (case.out / ".loftq").mkdir(parents=True)
        (case.out / ".loftq" / "partial").write_bytes(b"a file")
    elif how == 7:
        case.out.mkdir()
        (case.out / ".loftq").symlink_to(case.rng.choice((case.source, case.root, Path("/etc"), case.root / "no")))
    else:
        os.mkfifo(case.out)


def _merged(outputs: Outputs) -> bytes:
    return (outputs.root / "merged" / "model.safetensors").read_bytes()


def some_order(case: Case, sources: Sources, outputs: Outputs) -> None:
    """A worker whose order, work list or statuses are damaged."""
    rng: random.Random = case.rng
    shutil.copytree(outputs.model, case.source)
    shutil.copytree(outputs.root / "half" / "units", case.out)
    run = state_of(case) / "run-x"
    (run / "claims").mkdir(parents=True)
    recipe: dict[str, Any] = {"model": str(case.source), "bits": 2, "rank": 2, "iters": 1, "block_size": 32}
    order = {
        "recipe": recipe | {"max_shard_size": "40KB"}, "output": str(case.out), "stream": False, "rank": 0,
        "device": "cpu", "threads": 1, "max_memory": None, "run_id": "x",
    }  # fmt: skip
    units = {"fingerprint": _fingerprint(case), "units": [[0], [1], [2]], "finished": [], "nonfinite": {}}
    status = {"beat": 3, "host": "h", "place": "", "pid": 0, "started": 0.0, "unit": "", "device": "cpu"}
    contents = {
        name: json.dumps(one).encode() for name, one in (("order", order), ("units", units), ("status", status))
    }
    chosen = rng.choice(("order", "order", "units", "units", "status", "none"))
    if chosen != "none":
        contents[chosen] = damage_json(rng, contents[chosen])
    (run / "units").write_bytes(contents["units"])
    (run / "status.main").write_bytes(contents["status"].ljust(4096))
    (case.root / "order.json").write_bytes(contents["order"].replace(b"\n", b" "))
    case.command, case.damage = "worker", f"worker: {chosen}"


def _fingerprint(case: Case) -> str:
    return str(json.loads((state_of(case) / "journal").read_bytes().splitlines()[0])["fingerprint"])
