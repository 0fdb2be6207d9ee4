"""Cases of `inspect`, `verify`, `eval` and `push --dry-run`: damaged outputs."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loftq_cli.artifacts.manifest import seal
from support.fuzzing.case import Case
from support.fuzzing.damage import damage_bytes, damage_json, damage_weights
from support.fuzzing.damage_files import damage_files, files_below
from support.fuzzing.odd_values import AMOUNTS, COUNTS, NAMES, WEIRD
from support.fuzzing.outputs import FINISHED, Outputs
from support.fuzzing.sources import Sources

_CONTAINERS = ("packed", "packed", *FINISHED)


def some_inspect(case: Case, sources: Sources, outputs: Outputs) -> None:
    _damage(case, outputs, _DAMAGES)
    case.command = "inspect"
    case.words = [str(case.source), *case.rng.choice(([], ["--verbose"], ["--json"]))]


def some_verify(case: Case, sources: Sources, outputs: Outputs) -> None:
    _damage(case, outputs, _DAMAGES)
    case.command, case.words = "verify", [str(case.source), *case.rng.choice(([], ["--json"], ["-q"]))]


def some_verify_source(case: Case, sources: Sources, outputs: Outputs) -> None:
    model = outputs.model
    if case.rng.random() < 0.3:
        _damage(case, outputs, (_undamaged,))
        model = case.root / "model"
        shutil.copytree(outputs.model, model)
        if case.rng.random() < 0.5:
            damage_weights(case.rng, model / "model.safetensors")
            case.damage = "the source: odd tensors"
        else:
            case.damage = f"the source: {damage_files(case.rng, model)}"
        case.sound = None
    else:
        _damage(case, outputs, (*_DAMAGES, _sealed_manifest, _sealed_manifest, _resealed_weights))
    case.command, case.words = "verify --source", [str(model), str(case.source)]


def some_eval(case: Case, sources: Sources, outputs: Outputs) -> None:
    text = case.root / "text.txt"
    text.write_text("a b c word1 word2 z y x " * 12)
    model = outputs.model
    if case.rng.random() < 0.6:
        _damage(case, outputs, (_tokenizer, _tokenizer, *_DAMAGES), ("packed", "dense", "qalora"))
    elif case.rng.random() < 0.5:
        _damage(case, outputs, (_undamaged,), ("packed",))
        text = _odd_text(case)
    else:
        _damage(case, outputs, (_undamaged,), ("packed",))
        model = case.root / "model"
        shutil.copytree(outputs.model, model)
        case.damage = f"the source: {damage_files(case.rng, model)}"
    case.command = "eval"
    case.words = [str(case.source), "--text", str(text), "--max-tokens", "64", "--device", "cpu"]
    case.words += ["--source", str(model)] if case.rng.random() < 0.7 or model != outputs.model else []
    case.words += case.rng.choice(([], [], ["--window", "8"], ["--window", str(2**31)], ["--json"]))


def some_push(case: Case, sources: Sources, outputs: Outputs) -> None:
    _damage(case, outputs, (*_DAMAGES, _sealed_manifest, _card, _card))
    case.command = "push --dry-run"
    case.words = [str(case.source), "some-org/pushed", *case.rng.choice(([], ["--json"], ["--base-model", "a/b"]))]


# --- damage ---------------------------------------------------------------------------------------------------------


def _damage(
    case: Case,
    outputs: Outputs,
    damages: tuple[Callable[[Case], str], ...],
    containers: tuple[str, ...] = _CONTAINERS,
) -> None:
    sound = outputs.root / "finished" / case.rng.choice(containers)
    shutil.copytree(sound, case.source)
    case.sound = sound
    case.damage = case.rng.choice(damages)(case)


def _undamaged(case: Case) -> str:
    return "none"


def _files(case: Case) -> str:
    return damage_files(case.rng, case.source)


def _bytes(case: Case) -> str:
    path = case.rng.choice(files_below(case.source))
    path.write_bytes(damage_bytes(case.rng, path.read_bytes()))
    return "bytes of a file"


def _manifest_json(case: Case) -> str:
    case.edit("loftq.json", damage_json)
    return "manifest: JSON, not sealed"


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it the right digest again."""
    values = json.loads((folder / "loftq.json").read_bytes())
    change(values)
    text = json.dumps(values, indent=1).encode("utf-8", "surrogatepass")
    (folder / "loftq.json").write_bytes(seal(text))


def _sealed_manifest(case: Case) -> str:
    """Odd values in any field, with the right digest."""
    case.sound = None
    how = case.rng.randrange(4)
    damage = (odd_file_names, odd_matrix, odd_field, odd_field)[how]
    reseal(case.source, lambda values: damage(case.rng, values, case.root))
    return f"manifest, sealed: {damage.__name__.replace('_', ' ')}"


def odd_file_names(rng: random.Random, values: dict[str, Any], root: Path) -> None:
    """Files that lie elsewhere, with their right hashes, or have odd names."""
    outside = (root / "outside.txt").read_bytes()
    record = {"nbytes": len(outside), "sha256": hashlib.sha256(outside).hexdigest()}
    names = ("../outside.txt", "a/../../outside.txt", str(root / "outside.txt"), "./config.json", "loftq_init", *NAMES)
    for _ in range(rng.choice((1, 1, 3))):
        values["files"][rng.choice(names)] = rng.choice((record, record, {"nbytes": 0, "sha256": "0" * 64}))


def odd_matrix(rng: random.Random, values: dict[str, Any], root: Path) -> None:
    """Counts, names and kinds of a matrix that are not what the files hold."""
    record = rng.choice(values["matrices"])
    name = rng.choice(sorted(record))
    old = record[name]
    if isinstance(old, list) and old:
        old[rng.randrange(len(old))] = rng.choice(COUNTS)
    elif isinstance(old, (int, float)):
        record[name] = rng.choice((*COUNTS, *AMOUNTS))
    elif isinstance(old, str):
        record[name] = rng.choice((*NAMES, rng.choice(values["matrices"])[name]))
    else:
        record[name] = rng.choice(WEIRD)
    if rng.random() < 0.1:
        values["matrices"] = values["matrices"] * rng.choice((2, 50))


def odd_field(rng: random.Random, values: dict[str, Any], root: Path) -> None:
    """A field of the manifest, of the recipe or of the totals."""
    holder = rng.choice((values, values, values["recipe"], values["totals"], values["versions"]))
    name = rng.choice(sorted(holder))
    if name != "digest":
        holder[name] = rng.choice((*WEIRD, *NAMES, *COUNTS))


def _resealed_weights(case: Case) -> str:
    """Other weights than the manifest's residuals describe, with the right hashes."""
    case.sound = None
    files = [path for path in files_below(case.source) if path.suffix == ".safetensors"]
    if not files:
        return _undamaged(case)
    path = case.rng.choice(files)
    damage_weights(case.rng, path)
    content = path.read_bytes()
    name = path.relative_to(case.source).as_posix()
    record = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(case.source, lambda values: values["files"].update({name: record}))
    return "odd tensors, sealed"


_TEXTS = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja")


def _tokenizer(case: Case) -> str:
    name = case.rng.choice(_TEXTS)
    path = case.source / name
    if name == "tokenizer.json" and case.rng.random() < 0.4:
        return _tokenizer_fields(case, path)
    how = damage_json if name.endswith(".json") and case.rng.random() < 0.8 else damage_bytes
    path.write_bytes(how(case.rng, path.read_bytes()))
    if case.rng.random() < 0.1:
        (case.source / "tokenization_evil.py").write_text(f"open({str(case.mark)!r}, 'w')\n")
        config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_evil.E", None]}}
        (case.source / "tokenizer_config.json").write_text(json.dumps(config))
        return "the tokenizer's own code"
    return f"{name}: {how.__name__.removeprefix('damage_')}"


def _tokenizer_fields(case: Case, path: Path) -> str:
    """Expressions that backtrack, numbers of tokens without a model for them, and unknown parts."""
    values = json.loads(path.read_bytes())
    how = case.rng.randrange(4)
    if how == 0:
        expression = case.rng.choice(("(a+)+$", "( ?[a-z ]+)+!", "(?=(.+))\\1+z", "[", "(.*)*x", "(?:.*){9}q"))
        values["pre_tokenizer"]["pattern"]["Regex"] = expression
    elif how == 1:
        values["model"]["vocab"] = {f"{i}": case.rng.choice((0, i, 2**31, -1)) for i in range(400)}
    elif how == 2:
        values["model"] |= {"type": case.rng.choice(("BPE", "Unigram", "WordPiece", "x")), "merges": [["a", "b"]]}
    else:
        values["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10}
    path.write_text(json.dumps(values))
    return "tokenizer.json: fields"


def _odd_text(case: Case) -> Path:
    """Texts of every type; they are the user's own, but are parsed."""
    case.damage = "text"
    suffix = case.rng.choice((".txt", ".jsonl", ".json", ".parquet", ".md"))
    path = case.root / f"text{suffix}"
    good = b'{"text": "a b c d e f g h i j k l m n o p q r s t u v w x y z word1 word2"}\n' * 3
    content = case.rng.choice((good, b"", b"\xff\xfe", b"[" * 5000, b'{"text": 3}\n', b"1e999", b"PAR1" + bytes(40)))
    path.write_bytes(damage_bytes(case.rng, content) if case.rng.random() < 0.5 else content)
    return path


def _card(case: Case) -> str:
    """The small files that `push` rewrites, with their right hashes."""
    case.sound = None
    name = case.rng.choice(("README.md", "loftq.yaml", "loftq_init/adapter_config.json"))
    path = case.source / name
    content = path.read_bytes()
    how = case.rng.randrange(4)
    if how == 0:
        content = damage_json(case.rng, content) if name.endswith(".json") else damage_bytes(case.rng, content)
    elif how == 1:
        content = case.rng.choice((b"", b"\xff", b"---\n" + b"a: " * 3000, b"---\n&a [*a]\n---\n", b"[" * 9000))
    elif how == 2:
        odd = case.rng.choice(NAMES).encode("utf-8", "surrogatepass")
        content = content.replace(b"loftq", odd, case.rng.choice((1, 100)))
    else:
        content = b"---\nlicense: !!python/object/apply:os.system ['true']\ntags: {a: b}\n---\n" + content
    path.write_bytes(content)
    record = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(case.source, lambda values: values["files"].update({name: record}))
    return f"{os.path.basename(name)}, sealed"


_DAMAGES: tuple[Callable[[Case], str], ...] = (_files, _files, _bytes, _manifest_json, _sealed_manifest, _undamaged)
