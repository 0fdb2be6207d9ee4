"""Damage to an unfinished output: its journal, shards, locks, marks and links."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from support.fuzzing.case import Case
from support.fuzzing.damage import damage_bytes, damage_json, damage_weights, places
from support.fuzzing.damage_files import damage_files, files_below
from support.fuzzing.odd_values import COUNTS, NAMES, WEIRD


def state_of(case: Case) -> Path:
    return case.out / ".loftq"


def journal(case: Case) -> str:
    path = state_of(case) / "journal"
    if path.is_file():
        path.write_bytes(damage_bytes(case.rng, path.read_bytes()))
    return "journal: bytes"


def forged_journal(case: Case) -> str:
    """Odd values in a line of the journal, with the right hash of the line."""
    path, rng = state_of(case) / "journal", case.rng
    lines = path.read_bytes().splitlines()
    number = rng.randrange(len(lines))
    values = json.loads(lines[number])
    values.pop("check", None)
    *way, key = rng.choice(places(values))
    holder = values
    for step in way:
        holder = holder[step]
    holder[key] = rng.choice((*WEIRD, *NAMES, *COUNTS))
    text = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
    check = hashlib.sha256(text).hexdigest()
    lines[number] = text[:-1] + f', "check": "{check}"}}'.encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    case.origin = None  # a forged residual is beyond what the state can show
    return "journal: odd values, sealed"


def digit(case: Case) -> str:
    """One digit of one number of the journal."""
    path = state_of(case) / "journal"
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    at = case.rng.choice(digits)
    content[at] = case.rng.choice([d for d in b"0123456789" if d != content[at]])
    path.write_bytes(content)
    return "journal: a digit"


def shards(case: Case) -> str:
    files = [path for path in files_below(case.out) if path.suffix == ".safetensors"]
    path = case.rng.choice(files)
    path.write_bytes(damage_bytes(case.rng, path.read_bytes()))
    return "bytes of a shard"


def small_files(case: Case) -> str:
    files = [path for path in files_below(case.out) if path.suffix in (".json", ".yaml", ".md", ".jinja")]
    if files:
        path = case.rng.choice(files)
        path.write_bytes(damage_bytes(case.rng, path.read_bytes()))
    return "bytes of a small file"


def links(case: Case) -> str:
    """A file or folder of the output that is a link, a FIFO or a folder."""
    rng, found = case.rng, sorted(case.out.rglob("*"))
    path = rng.choice([case.out / ".loftq", case.out / ".loftq" / "journal", *found])
    elsewhere = case.root / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    how = rng.randrange(5)
    if how == 0:
        path.symlink_to(elsewhere)
    elif how == 1:
        path.symlink_to(case.root / "outside.txt")
    elif how == 2:
        path.symlink_to(rng.choice(("/etc", "/dev/zero", "..", path.name, case.source, case.root / "no")))
    elif how == 3:
        os.mkfifo(path)
    else:
        path.mkdir()
    return ("link", "link", "link", "FIFO", "folder")[how]


def beside(case: Case) -> str:
    """Somebody's own files beside the output's."""
    name = case.rng.choice(("mine.txt", "config.json", "loftq.json", "loftq_init/x", "model.safetensors", "\x1b[31m"))
    path = case.out / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_bytes(b"mine")
    return "files beside it"


def locks(case: Case) -> str:
    rng = case.rng
    mine = json.dumps({"host": "x", "place": "y", "pid": 1, "started": 1.0}).encode()
    name = rng.choice(
        ("lock.1", "lock.0", "lock.99999999999999999999", "lock.-1", "lock.x", "lock", f"lock.{'9' * 200}")
    )
    path = state_of(case) / name
    how = rng.randrange(5)
    with contextlib.suppress(FileExistsError):
        if how == 0:
            os.mkfifo(path)
        elif how == 1:
            path.symlink_to(rng.choice((case.root / "outside.txt", "/dev/zero", case.root / "no")))
        elif how == 2:
            path.mkdir()
        else:
            path.write_bytes(damage_json(rng, mine) if how == 3 else rng.choice((b"", b"{", mine, b"\xff" * 70_000)))
            os.utime(path, (1, 1) if rng.random() < 0.8 else None)
    return "lock"


def runs(case: Case) -> str:
    """Folders and journals that workers of an earlier run left."""
    rng, state = case.rng, state_of(case)
    run = state / f"run-{rng.choice(('abc', '..', 'x' * 200))}"
    if rng.random() < 0.3:
        run.symlink_to(rng.choice((case.source, case.root, Path("/etc"))))
    else:
        (run / "claims").mkdir(parents=True)
        for name in ("units", "status.main", "status.0"):
            (run / name).write_bytes(damage_json(rng, b'{"fingerprint": "x", "units": [[1]], "pid": 4}'))
    lines = (state / "journal").read_bytes() if (state / "journal").is_file() else b""
    worker = state / f"journal.abc.{rng.choice((0, 1, 'x'))}"
    worker.write_bytes(rng.choice((damage_bytes(rng, lines), lines, b"{}\n" * 1000)))
    return "leftovers of workers"


def mark(case: Case) -> str:
    """The mark of a merge names other files."""
    odd = ["../outside.txt", "..", "/", ".", "mine.txt", case.rng.choice((*NAMES, *WEIRD))]
    text = json.dumps(odd).encode("utf-8", "surrogatepass")
    content = case.rng.choice((b"", b"{}", b"[" * 9000, text))
    (state_of(case) / "merge").write_bytes(content)
    (case.out / "mine.txt").write_bytes(b"mine")
    return "mark"


def source(case: Case) -> str:
    """Another source than the run began with."""
    case.reference = {}
    if case.rng.random() < 0.6:
        damage_weights(case.rng, case.source / "model.safetensors")
        return "a changed source"
    return f"the source: {damage_files(case.rng, case.source)}"


def undamaged(case: Case) -> str:
    return "none"


DAMAGES: tuple[Callable[[Case], str], ...] = (
    journal, journal, forged_journal, forged_journal, digit, digit, shards, shards, small_files, links,
    links, links, beside, locks, runs, mark, source, undamaged,
)  # fmt: skip
