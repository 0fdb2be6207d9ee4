"""Seeded fuzzing of everything a user can point loftq at: headers, indexes, configs, pickles, Meta's files, recipes.

    python tests/fuzz.py --cases 2000 --seed 1        # by hand; `--only N` repeats one case and keeps its files

Every case damages a small checkpoint in one to three places, runs `loftq quantize` in this process and judges the end:
exit code 0, 1, 2 or 4; on failure one sentence and nothing that looks like a model; on success files that hash to what
the manifest says; nothing executed, nothing written elsewhere, no more than ten seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer.testing
from safetensors.torch import load_file, save_file
from support.fuzz_pickles import hostile_pickle
from support.hub_server import HubServer, environment

from loftq_cli.cli import app

SECONDS = 10
REPO = "some-org/fuzzed"
MARK = "harm done"
FLAGS = ("--bits", "2", "--rank", "2", "--iters", "1", "--block-size", "32", "--device", "cpu")
WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**12, 10**30, 1.5, 1e308, float("nan"), float("inf"),
    "", "abc", "12", "../..", "/etc/passwd", "\x00", "\ud800", "💥", "a" * 5000, "{0.__class__}", "[bold]x[/]", "%s%n",
    [], [1], [None], [[]], {}, {"a": 1}, [1] * 400, ["a", 1, None], {"__float__": "Infinity"}, "__import__('os')",
)  # fmt: skip
_STARTS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.fork"})
RAW_NUMBERS = (b"1" * 5000, b"-" + b"9" * 400, b"1e999", b"0.1e-9999", b"NaN", b"-Infinity")


@dataclass
class Outcome:
    """What a case ended with; `findings` is empty where everything is as it should be."""

    number: int
    kind: str
    code: int
    said: str
    seconds: float
    findings: list[str] = field(default_factory=list)


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """Audit hook: what Python is asked to do while a case runs. Hooks cannot be removed, so there is one, switched."""

    _one: Watch | None = None

    def __init__(self) -> None:
        self.active = False
        self.folder = threading.local()  # the folder that a relative name is opened in
        self.seen: list[str] = []
        self.allowed: tuple[str, ...] = ()
        sys.addaudithook(self._hook)

    @classmethod
    def get(cls) -> Watch:
        cls._one = cls._one or cls()
        return cls._one

    @contextmanager
    def watching(self, *allowed: Path) -> Iterator[list[str]]:
        """Forbidden events while the block runs; files may be written below `allowed`."""
        self.seen, self.active = [], True
        self.allowed = (*(str(path) for path in allowed), "/dev/", "/proc/")
        real = os.open

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            # The event does not say which folder a name is relative to.
            self.folder.path = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            return real(path, flags, mode, dir_fd=dir_fd)

        os.open = opened
        try:
            yield self.seen
        finally:
            os.open, self.active = real, False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        started = event in _STARTS or event == "pickle.find_class"
        imported = event == "import" and str(arguments[0]).startswith("modeling_evil")
        connected = event in ("socket.connect", "socket.getaddrinfo") and "127.0.0.1" not in repr(arguments)
        if started or imported or connected:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str) and self._writes(arguments):
            base = getattr(self.folder, "path", None) if arguments[1] is None else None  # os.open has no mode
            path = os.path.normpath(os.path.join(base or os.getcwd(), arguments[0]))
            if not path.startswith(self.allowed) and "__pycache__" not in path:
                self.seen.append(f"writes {path}")

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class Sources:
    """Small sound checkpoints of every kind, made once."""

    def __init__(self, root: Path) -> None:
        from support.families import FAMILIES
        from support.meta_reference import make_reference, tiktoken_file, tiktoken_ranks, write_meta

        self.root = root
        for family in ("llama", "gpt2", "bert", "t5", "mixtral"):
            FAMILIES[family]().save_pretrained(root / family)
        self._small_llama(root / "tiny")
        shutil.copytree(root / "llama", root / "sharded")
        self._shard(root / "sharded")
        tensors = load_file(root / "tiny" / "model.safetensors")
        for name, zipped in (("bin", True), ("legacy", False)):
            shutil.copytree(root / "tiny", root / name)
            (root / name / "model.safetensors").unlink()
            torch.save(tensors, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        small = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 32, "rope_theta": 500000.0}
        self._fp8(root / "fp8", tensors)
        ranks = tiktoken_ranks(0)
        meta = write_meta(make_reference(len(ranks) + 16, **small), root / "meta", ranks=2, embedding_dim=0)
        (meta / "tokenizer.model").write_bytes(tiktoken_file(ranks))

    def _small_llama(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=48, max_position_embeddings=32, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
        )
        (folder / "tokenizer_config.json").write_text("{}")

    def _fp8(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """As DeepSeek-V3 stores its weights."""
        shutil.copytree(self.root / "tiny", folder)
        stored = {}
        for name, tensor in tensors.items():
            if "proj" in name:
                stored[name] = tensor.to(torch.float8_e4m3fn)
                stored[f"{name}_scale_inv"] = torch.ones(-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16))
            else:
                stored[name] = tensor
        save_file(stored, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (folder / "config.json").write_text(json.dumps(config))

    def _shard(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, index = list(tensors), {}
        for i in range(2):
            file, part = f"model-{i + 1:05d}-of-00002.safetensors", names[i::2]
            save_file({name: tensors[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# --- damage ---------------------------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat, zero: somewhere, mostly near the beginning or the end, where structure is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = min(len(data), int(rng.choice((rng.random() ** 4, 1 - rng.random() ** 4, rng.random())) * (len(data) + 1)))
        length = rng.choice((1, 1, 2, 8, 64, 1000))
        how = rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[at:at] = rng.randbytes(length)
        elif how == 3:
            data[at:at] = data[at : at + length]
        elif how == 4:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[at : at + length]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in items] + [p for key, inner in items for p in places(inner, (*path, key))]


def nested(rng: random.Random) -> Any:
    """Lists in lists, up to what the parser's stack would not take."""
    value: Any = 1
    for _ in range(rng.choice((3, 50, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Odd values, missing and doubled keys, swapped values, bombs, or damaged bytes."""
    how = rng.randrange(12)
    if how == 0:
        return damage_bytes(rng, content)
    if how == 1:
        return rng.choice((b"", b"[]", b"null", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000))
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(document)
        if not found:
            break
        *way, key = rng.choice(found)
        holder = document
        for step in way:
            holder = holder[step]
        odd = nested(rng) if how == 2 else rng.choice(WEIRD)
        if how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[rng.choice(("x", "../y", "\x00", "__metadata__", "a.b"))] = holder.pop(key)
        elif how == 5:
            _, *other = (None, *rng.choice(found))
            source: Any = document
            for step in other:
                source = source[step] if isinstance(source, (dict, list)) else None
                if source is None:
                    break
            holder[key] = source if not isinstance(source, (dict, list)) else odd
        elif how in (6, 7) and isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 8, -8, 2**31, 2**62, -(2**40)))
        else:
            holder[key] = odd
    try:
        text = json.dumps(document).encode()
    except (ValueError, RecursionError):  # a value that holds itself
        return b"{}"
    if how == 8 and b":" in text:  # a number no Python value can be
        head, _, tail = text.partition(b": ")
        text = head + b": " + rng.choice(RAW_NUMBERS) + tail[len(tail.split(b",")[0].split(b"}")[0]) :]
    if how == 9:  # keys twice
        text = text.rstrip(b"}") + b", " + text.lstrip(b"{") if text.startswith(b"{") else text
    return text


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header's length, its JSON, or bytes anywhere."""
    how, length = rng.randrange(4), int.from_bytes(content[:8], "little")
    if how == 0:
        return damage_bytes(rng, content)
    if how == 1:
        claimed = rng.choice((0, 1, length - 1, length + 1, 2 * length, 100_000_000, 2**40, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + content[8:]
    header = damage_json(rng, content[8 : 8 + length].rstrip())
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damage_weights(rng: random.Random, folder: Path) -> None:
    """Sound files with odd tensors: other dtypes and shapes, NaN, extremes, missing, doubled and extra ones."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        how = rng.randrange(11)
        if how == 0:
            del tensors[name]
        elif how == 1:
            dtypes = (
                torch.int8,
                torch.int64,
                torch.bool,
                torch.float64,
                torch.bfloat16,
                torch.float8_e4m3fn,
                torch.uint8,
            )
            tensors[name] = tensor.to(rng.choice(dtypes))
        elif how == 2:
            tensors[name] = tensor[: rng.randrange(len(tensor) + 1)].clone()
        elif how == 3:
            tensors[name] = tensor.reshape(rng.choice([(1, -1), (-1,), (-1, 1), (1, 1, -1)])).clone()
        elif how == 4 and tensor.is_floating_point():
            tensor.view(-1)[rng.randrange(tensor.numel()) :: 997] = rng.choice(
                (float("nan"), float("inf"), -float("inf"))
            )
        elif how == 5 and tensor.is_floating_point():
            tensors[name] = (tensor.float() * rng.choice((0.0, 1e30, 1e-30, 1e-42, 3e38))).to(tensor.dtype)
        elif how == 6 and tensor.is_floating_point():
            tensor.view(-1)[0] = rng.choice((1e30, -3e38, 1e10))
        elif how == 7:
            tensors[rng.choice(("extra.weight", f"{name}_scale", f"{name}_scale_inv", "x" * 300))] = tensor.clone()
        elif how == 8:
            tensors[name + rng.choice(("", ".weight", "é", " "))] = tensors.pop(name)
        elif how == 9:
            tensors[name.replace("weight", "qweight")] = tensors.pop(name).to(torch.int32)
        else:
            other = rng.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
        if not tensors:
            break
    save_file(tensors, path)


def damage_files(rng: random.Random, folder: Path) -> None:
    """Files that are gone, empty, folders, links, or something else."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    how = rng.randrange(8)
    content = path.read_bytes()
    path.unlink()
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.write_bytes(b"")
    elif how == 2:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    elif how == 3:
        path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "/dev/null", path.name, "../outside.txt", "/")))
    elif how == 4:
        os.mkfifo(path)
    elif how == 5:
        path.write_bytes(b"<html>404</html>")
    elif how == 6:
        (path.parent / f"{path.name}.bak").write_bytes(content)


RECIPES = (
    "bits: {w}", "rank: {w}", "iters: {w}", "rule: {w}", "include: {w}", "block_size: {w}", "alpha: {w}", "seed: {w}",
    "max_shard_size: {w}", "format: {w}", "dtype: {w}", "model: {w}", "keep_last: {w}", "revision: {w}", "{w}: 1",
    "meta_version: {w}", "exclude: {w}", "data_type: {w}", "{w}", "method: {w}", "embeddings: {w}", "svd: {w}",
)  # fmt: skip
YAML_VALUES = (
    "!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system", "!!python/object/new:open [x, w]",
    "!!python/module:os", "!!bool x", "!!int ''", "!!float abc", "!!timestamp x", "!!binary '%'", "2001-99-99", "0x",
    ".nan", "-.inf", "0o9", "1_000", "*nowhere", "&a [*a]", "{{a: &b [1], c: *b}}", "[2, 3]", "'2'", "4.0", "true",
    "null", "~", "'['", "['(=2', 'x=9']", "'*'", "[1, 2]", "{{}}", "'a=2:99999999999999999999'", "1e400", "9" * 5000,
    "'\\0'", "\"\\ud800\"", "- - -", "? [a]\n: b", "%TAG ! x", "\t", "'10 PB'", "'1e3GB'", "'" + "9" * 400 + "GB'",
    "💥", "'.*.*.*.*=2'", "'(a+)+$=2'",
)  # fmt: skip


def bomb() -> str:
    """A billion laughs."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join([*lines, "rule: *a11"])


def write_recipe(rng: random.Random, path: Path, mark: Path) -> None:
    lines = []
    for _ in range(rng.choice((1, 1, 2))):
        value = rng.choice(YAML_VALUES).replace("{mark}", str(mark)).replace("{{", "{").replace("}}", "}")
        lines.append(rng.choice(RECIPES).replace("{w}", value))
    content = "\n".join(lines)
    if rng.random() < 0.1:
        content = rng.choice(
            (bomb(), "[" * 3000, "{a: " * 3000, "\x00", "bits: 2\nbits: 4", "---\n---\n", "", "\ufeffbits: 2")
        )
    data = content.encode("utf-8", "surrogatepass")
    path.write_bytes(damage_bytes(rng, data) if rng.random() < 0.1 else data)


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A folder for one case: the source in `source`, the output in `out`; `words` are the command's arguments."""

    root: Path
    rng: random.Random
    words: list[str] = field(default_factory=list)
    command: str = "quantize"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def mark(self) -> Path:
        return self.root / MARK

    def command_line(self, model: str) -> list[str]:
        if self.command == "inspect":
            return ["inspect", model]
        recipe = self.root / "recipe.yaml"
        named = recipe.exists() and b"model:" in recipe.read_bytes()
        words = [self.command, *([] if named else [model]), "-o", str(self.out), *self.words]
        words += FLAGS if not recipe.exists() else ()
        return words + (["-q"] if self.command == "quantize" else [])

    def edit(self, name: str, how: Callable[[random.Random, bytes], bytes]) -> None:
        path = self.source / name
        path.write_bytes(how(self.rng, path.read_bytes()))


def some_config(case: Case, sources: Sources) -> None:
    shutil.copytree(
        sources.root / case.rng.choice(("tiny", "tiny", "llama", "gpt2", "bert", "t5", "mixtral")), case.source
    )
    case.edit("config.json", damage_json)
    if case.rng.random() < 0.15:
        config = {"model_type": case.rng.choice(("evil", "llama")), "architectures": ["EvilForCausalLM"]}
        config |= {"auto_map": {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": "modeling_evil.Evil"}}
        (case.source / "modeling_evil.py").write_text(f"open({str(case.mark)!r}, 'w')\n")
        (case.source / "config.json").write_text(json.dumps(config))


def some_header(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / "tiny", case.source)
    case.edit("model.safetensors", damage_safetensors)


def some_index(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / "sharded", case.source)
    if case.rng.random() < 0.8:
        case.edit("model.safetensors.index.json", damage_json)
    if case.rng.random() < 0.3:
        case.edit("model-00002-of-00002.safetensors", damage_safetensors)
    if case.rng.random() < 0.3:
        damage_files(case.rng, case.source)


def some_weights(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / case.rng.choice(("tiny", "tiny", "fp8")), case.source)
    damage_weights(case.rng, case.source)
    if case.rng.random() < 0.1:
        case.edit("config.json", damage_json)
    if case.rng.random() < 0.4:
        case.words.append("--allow-nonfinite")


def some_pickle(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / case.rng.choice(("bin", "legacy")), case.source)
    if case.rng.random() < 0.5:
        (case.source / "pytorch_model.bin").write_bytes(hostile_pickle(case.rng, case.mark, damage_bytes))
    else:
        case.edit("pytorch_model.bin", damage_bytes)


def some_meta(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / "meta", case.source)
    how = case.rng.randrange(5)
    if how < 2:
        case.edit("params.json", damage_json)
    elif how == 2:
        case.edit("tokenizer.model", damage_bytes)
    elif how == 3:
        damage_files(case.rng, case.source)
    else:
        data = hostile_pickle(case.rng, case.mark, damage_bytes)
        (case.source / "consolidated.01.pth").write_bytes(data)


def some_files(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / case.rng.choice(("tiny", "sharded", "bin", "meta")), case.source)
    damage_files(case.rng, case.source)


def some_recipe(case: Case, sources: Sources) -> None:
    shutil.copytree(sources.root / "tiny", case.source)
    write_recipe(case.rng, case.root / "recipe.yaml", case.mark)
    case.words = ["--config", str(case.root / "recipe.yaml")]


def some_output(case: Case, sources: Sources) -> None:
    """Output directories that are something else."""
    shutil.copytree(sources.root / "tiny", case.source)
    how = case.rng.randrange(7)
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
    else:
        (case.out / ".loftq").mkdir(parents=True)
        (case.out / ".loftq" / "partial").write_bytes(b"a file")


def some_manifest(case: Case, sources: Sources) -> None:
    """`loftq inspect` of a finished output whose files are damaged."""
    shutil.copytree(sources.root.parent / "warm-tiny", case.source)
    case.edit("loftq.json", damage_json)
    case.command = "inspect"


KINDS: dict[str, tuple[int, Callable[[Case, Sources], None]]] = {
    "config": (6, some_config),
    "header": (6, some_header),
    "index": (4, some_index),
    "weights": (4, some_weights),
    "pickle": (6, some_pickle),
    "meta": (4, some_meta),
    "files": (2, some_files),
    "recipe": (4, some_recipe),
    "output": (2, some_output),
    "manifest": (2, some_manifest),
}
STREAMED = ("config", "header", "index", "pickle", "meta")  # kinds that are also put on the Hub


class Fuzzer:
    """Runs cases below `root`; `hub` serves those that are streamed."""

    def __init__(self, root: Path, seed: int, hub: HubServer | None = None) -> None:
        self.root, self.seed, self.hub = root, seed, hub
        root.mkdir(exist_ok=True)
        self.sources = Sources(root / "sound")
        self.watch = Watch.get()
        self._warm_up()

    def run(self, number: int, *, keep: bool = False) -> Outcome:
        """Case `number` of this seed."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        case = Case(self.root / f"case{number}", rng)
        case.root.mkdir()
        (case.root / "outside.txt").write_bytes(b"private")
        KINDS[kind][1](case, self.sources)
        before = snapshot(case.source)
        model = str(case.source)
        if self.hub is not None and kind in STREAMED and rng.random() < 0.25:
            kind, model = f"{kind} streamed", self._publish(case)
            case.words.append("--stream")
        if case.command == "quantize" and "--overwrite" not in case.words and rng.random() < 0.1:
            case.command = "plan"
        there = case.out.exists()
        outcome = self._invoke(case, kind, case.command_line(model))
        if case.command == "plan" and case.out.exists() and not there:
            outcome.findings.append("a plan wrote something")
        outcome.number = number
        if not kind.startswith("output") and snapshot(case.source) != before:
            outcome.findings.append("the source was changed")
        if not keep:
            shutil.rmtree(case.root, ignore_errors=True)
        return outcome

    def _warm_up(self) -> None:
        """What is imported and compiled at the first run of a process is not a case's doing."""
        for name in ("tiny", "bin", "legacy", "meta", "fp8", "mixtral", "gpt2", "bert", "t5"):
            out = self.root / f"warm-{name}"
            result = typer.testing.CliRunner().invoke(
                app, ["quantize", str(self.sources.root / name), "-o", str(out), *FLAGS]
            )
            assert result.exit_code == 0, (name, result.output)

    def _publish(self, case: Case) -> str:
        assert self.hub is not None
        self.hub.repos.clear()
        files = {path.name: path.read_bytes() for path in case.source.iterdir() if path.is_file()}
        self.hub.add(REPO, files)
        return REPO

    def _invoke(self, case: Case, kind: str, words: list[str]) -> Outcome:
        before = time.monotonic()
        cache = Path(os.environ["HF_HOME"]) if self.hub is not None else self.root / "cache"
        allowed = [case.out, case.root / "nowhere", Path(os.environ["XDG_CACHE_HOME"]), cache]
        if case.command == "plan":  # which measures the disk beside the output, in a file without a name
            allowed.append(case.root)
        with self.watch.watching(*allowed) as seen, deadline(SECONDS):
            try:
                result = typer.testing.CliRunner().invoke(app, words, catch_exceptions=True)
            except Hang as hang:
                where = "".join(traceback.format_tb(hang.__traceback__)[-4:])
                return Outcome(0, kind, -1, "", time.monotonic() - before, [f"hangs:\n{where}"])
        outcome = Outcome(0, kind, result.exit_code, result.stderr.strip(), time.monotonic() - before)
        outcome.findings += seen
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            shown = "".join(traceback.format_exception(result.exception)[-4:])
            outcome.findings.append(
                f"hangs:\n{shown}" if isinstance(result.exception, Hang) else f"traceback:\n{shown}"
            )
        outcome.findings += judge(case, result.exit_code, result.stderr, result.stdout)
        return outcome


def judge(case: Case, code: int, stderr: str, stdout: str) -> list[str]:
    """What is wrong with the end of a case."""
    wrong = []
    lines = [line for line in stderr.splitlines() if line.strip()]
    if code not in (0, 1, 2, 4):
        wrong.append(f"exit code {code}")
    if "Traceback" in stderr + stdout or "loftq: unexpected" in stderr:
        wrong.append(f"a traceback, or what should have been one: {stderr:.600}")
    if code and (len(lines) != 1 or not lines[0].startswith("loftq: ")):
        wrong.append(f"{len(lines)} lines instead of a sentence: {stderr:.600}")
    if case.mark.exists():
        wrong.append("EXECUTED")
    if code and case.out.is_dir() and not case.out.is_symlink():
        left = {path.name for path in case.out.iterdir()} - {".loftq", "mine.txt", "loftq.json"}
        wrong += [f"left behind {sorted(left)}"] if left else []
    if case.command != "quantize":
        return wrong
    return wrong if code else [*wrong, *unsound(case.out)]


def unsound(out: Path) -> list[str]:
    """What is wrong with an output that is said to be complete."""
    try:
        manifest = json.loads((out / "loftq.json").read_bytes())
        wrong = [] if (out / "config.json").is_file() and not (out / ".loftq").exists() else ["half an output"]
        for name, record in manifest["files"].items():
            if hashlib.sha256((out / name).read_bytes()).hexdigest() != record["sha256"]:
                wrong.append(f"{name} is not what the manifest says")
        json.loads((out / "config.json").read_bytes())
        for path in out.rglob("*.safetensors"):
            load_file(path)
        return wrong
    except Exception as error:
        return [f"an output that cannot be read: {type(error).__name__}: {error}"]


def snapshot(folder: Path) -> dict[str, object]:
    """Names, kinds and contents of a folder's files."""
    return {
        path.name: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in folder.iterdir()
    }


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise `Hang` after some seconds; where even that does not help, say where and end the process."""

    def fire(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, fire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def loopback_hub(home: Path) -> Iterator[HubServer]:
    """A Hub for this process; the environment has to be set before huggingface_hub is imported anywhere else."""
    from huggingface_hub import close_session, constants

    from loftq_cli.hub import retry

    with HubServer() as server:
        os.environ.update(environment(server, home))
        os.environ.pop("HF_HUB_OFFLINE", None)
        constants.ENDPOINT = server.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = str(home / "hub"), str(home / "token")
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
        retry.FIRST_PAUSE = 0.001
        close_session()
        yield server
        close_session()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone, keep its files and print what it said")
    chosen = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="loftq-fuzz-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    kinds, codes, bad = Counter[str](), Counter[int](), 0
    started, slowest = time.monotonic(), 0.0
    with loopback_hub(root / "cache") as hub:
        fuzzer = Fuzzer(root, chosen.seed, hub)
        for number in range(chosen.cases) if chosen.only is None else [chosen.only]:
            outcome = fuzzer.run(number, keep=chosen.only is not None)
            kinds[outcome.kind] += 1
            codes[outcome.code] += 1
            slowest = max(slowest, outcome.seconds)
            bad += bool(outcome.findings)
            for finding in outcome.findings:
                print(f"case {number} ({outcome.kind}): {finding}", flush=True)
            if chosen.only is not None:
                print(f"{outcome.kind}: exit code {outcome.code} after {outcome.seconds:.1f} s: {outcome.said}\n{root}")
    print(
        f"seed {chosen.seed}: {sum(kinds.values())} cases in {time.monotonic() - started:.0f} s, "
        f"slowest {slowest:.1f} s; "
        f"exit codes {dict(sorted(codes.items()))}; kinds {dict(sorted(kinds.items()))}; {bad} with findings"
    )
    if chosen.only is None:
        shutil.rmtree(root, ignore_errors=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
