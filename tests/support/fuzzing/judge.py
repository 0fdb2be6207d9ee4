"""What must hold at the end of every case."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import xml.etree.ElementTree
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.fuzzing.case import Case
from support.fuzzing.odd_values import SECRETS
from support.fuzzing.outputs import weight_hashes

_DOCUMENTED = {
    "quantize": {0, 1, 2, 4},
    "plan": {0, 1, 2, 4},
    "inspect": {0, 1, 4},
    "verify": {0, 1, 2, 3, 4},
    "verify --source": {0, 1, 2, 3, 4},
    "eval": {0, 1, 2, 4},
    "push --dry-run": {0, 1, 2, 3, 4},
    "merge": {0, 1, 2, 4},
    "batch": {0, 1, 2, 4},
    "batch --dry-run": {0, 1, 2, 4},
    "worker": {0, 1, 2, 4},
}
_LEFT = {".loftq", "mine.txt", "loftq.json"}  # what a failure may leave in the output
_LARGEST = 10_000_000


def judge(case: Case, code: int, stderr: str, stdout: str) -> list[str]:
    """Return what is wrong with the end of a case."""
    wrong = []
    if code not in _DOCUMENTED[case.command]:
        wrong.append(f"exit code {code}")
    if "Traceback" in stderr + stdout or "loftq: unexpected" in stderr:
        wrong.append(f"a traceback, or what should have been one: {stderr:.3000}")
    wrong += _sentences(case, code, stderr, stdout)
    wrong += _text(stderr, "stderr") + _text(stdout, "stdout")
    if case.mark.exists():
        wrong.append("EXECUTED")
    if code and case.command in ("quantize", "merge"):
        wrong += _left_behind(case)
    if code == 0:
        wrong += _succeeded(case, stdout)
    return wrong


def _sentences(case: Case, code: int, stderr: str, stdout: str) -> list[str]:
    lines = [line for line in stderr.splitlines() if line.strip()]
    if code == 3 and case.command.startswith("verify") and "--json" in case.words:
        return [] if json.loads(stdout)["ok"] is False else ["exit code 3 for what is well"]
    if case.command == "worker" or (case.command.startswith("batch") and not lines):
        return []  # a worker's sentence is in its status, and a batch's in its report
    lines = [line for line in lines if line != "verifying" and not line.startswith("note: ")]
    if code and (len(lines) != 1 or not lines[0].startswith("loftq: ") or lines[0][-1] not in ".?"):
        return [f"{len(lines)} lines instead of a sentence: {stderr:.3000}"]
    return []


def _text(text: str, where: str) -> list[str]:
    odd = {character for character in text if not character.isprintable() and character != "\n"}
    wrong = [f"{where} has {odd}: {text!r:.300}"] if odd else []
    if any(secret in text for secret in SECRETS) and not (where == "stdout" and text.startswith("{")):
        wrong.append(f"{where} shows a secret: {text!r:.300}")
    return wrong


def _left_behind(case: Case) -> list[str]:
    """On failure, nothing that looks like a model: files of ours, or of an earlier run before it failed."""
    if not case.out.is_dir() or case.out.is_symlink():
        return []
    names = {path.name for path in case.out.iterdir()}
    left = names - case.before - _LEFT
    if case.before - _LEFT and "config.json" not in left:
        return []
    return [f"left behind {sorted(left)}"] if left else []


def _succeeded(case: Case, stdout: str) -> list[str]:
    if case.command == "quantize":
        return [*unsound(case.out), *_other_than_reference(case), *_unverified(case)]
    if case.command == "merge":
        return [*_unsound_merge(case.out), *_other_than_reference(case)]
    if case.command in ("verify", "push --dry-run") or (case.command == "verify --source" and case.sound is not None):
        return _overlooked(case)
    if case.command.startswith("batch"):
        return _reports(case)
    return []


def unsound(out: Path) -> list[str]:
    """Return what is wrong with an output that is said to be complete."""
    try:
        manifest = json.loads((out / "loftq.json").read_bytes())
        whole = (out / "config.json").is_file() and not (out / ".loftq" / "journal").exists()
        wrong = [] if whole else ["half an output"]
        for name, record in manifest["files"].items():
            if hashlib.sha256((out / name).read_bytes()).hexdigest() != record["sha256"]:
                wrong.append(f"{name} is not what the manifest says")
        json.loads((out / "config.json").read_bytes())
        for path in out.rglob("*.safetensors"):
            load_file(path)
        return wrong
    except Exception as error:
        return [f"an output that cannot be read: {type(error).__name__}: {error}"]


def _unverified(case: Case) -> list[str]:
    """`verify` must agree, and with the source where that is known to be the model that was converted."""
    from loftq_cli import verify

    try:
        found = verify(case.out, source=case.origin)
    except Exception as error:
        return [f"verify fails: {type(error).__name__}: {error}"]
    foreign = [one for one in found.problems if one.what != "is not part of the conversion"]
    return [f"verify finds {', '.join(map(str, foreign))}"] if foreign else []


def _other_than_reference(case: Case) -> list[str]:
    if not case.reference:
        return []
    found = weight_hashes(case.out)
    different = sorted(name for name, digest in case.reference.items() if found.get(name) != digest)
    return [f"{', '.join(different)} differ from an undisturbed run's"] if different else []


def _unsound_merge(out: Path) -> list[str]:
    try:
        wrong = []
        if not (out / "config.json").is_file() or (out / ".loftq" / "merge").exists():
            wrong.append("half a merge")
        json.loads((out / "config.json").read_bytes())
        for path in sorted(out.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    wrong.append(f"{name} of the merge is not finite")
        return wrong
    except Exception as error:
        return [f"a merge that cannot be read: {type(error).__name__}: {error}"]


def _overlooked(case: Case) -> list[str]:
    """`verify` and `push` must see every file that differs from the sound output's."""
    if case.sound is None:
        return []
    wrong = []
    for path in sorted(case.sound.rglob("*")):
        if path.is_file():
            name = path.relative_to(case.sound)
            found = case.source / name
            inside = os.path.realpath(found).startswith(os.path.realpath(case.source) + os.sep)
            same = found.is_file() and found.stat().st_size < _LARGEST and found.read_bytes() == path.read_bytes()
            if not same or (case.command.startswith("push") and not inside):
                wrong.append(f"{name} differs, and {case.command} did not see it")
    return wrong


def _reports(case: Case) -> list[str]:
    wrong = []
    try:
        if (case.out / "summary.json").exists():
            json.loads((case.out / "summary.json").read_bytes())
        if (case.out / "junit.xml").exists():
            xml.etree.ElementTree.parse(case.out / "junit.xml")
    except Exception as error:
        wrong.append(f"a report that cannot be read: {type(error).__name__}: {error}")
    for folder in case.out.glob("all/*"):
        if case.command == "batch" and (folder / "config.json").exists():
            wrong += unsound(folder)
    return wrong


def snapshot(folder: Path, *without: Path) -> dict[str, object]:
    """Return kinds, sizes and contents of everything below a folder; links are not followed."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(place) / name not in without]
        for name in (*folders, *files):
            path = Path(place) / name
            if path not in without:
                found[str(path.relative_to(folder))] = _content(path)
    return found


def _content(path: Path) -> object:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if stat.S_ISREG(status.st_mode) and status.st_size < _LARGEST:
        return path.read_bytes()
    return stat.S_IFMT(status.st_mode), status.st_size if stat.S_ISREG(status.st_mode) else 0
