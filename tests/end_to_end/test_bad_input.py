"""Malformed, hostile and inconsistent input: exit code 1 (2 for usage) and one sentence within seconds, nothing
executed, nothing left that looks like a model."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from safetensors.torch import load_file, save_file
from support.fuzz_pickles import CALLS, bombs, call
from support.paths import ROOT

from loftq_cli.cli import app

SECONDS = 10


@pytest.fixture(scope="module", autouse=True)
def compiled(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import and compile everything first, so that no case is charged for it."""
    out = tmp_path_factory.mktemp("first") / "out"
    assert typer.testing.CliRunner().invoke(app, ["quantize", str(random_llama), "-o", str(out), "-q"]).exit_code == 0


@pytest.fixture
def source(random_llama: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return shutil.copytree(random_llama, tmp_path / "source")


def refused(source: Path, *words: object, code: int = 1, out: Path | None = None) -> str:
    """Return the sentence with which `loftq quantize` fails."""
    out = out or source.parent / "out"
    before = sorted(out.iterdir()) if out.is_dir() else None
    started = time.monotonic()
    result = typer.testing.CliRunner().invoke(
        app, ["quantize", str(source), "-o", str(out), "-q", "--iters", "1", *map(str, words)]
    )
    assert time.monotonic() - started < SECONDS
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == code and len(lines) == 1 and result.stdout == "", (result.exit_code, result.output)
    assert lines[0].startswith("loftq: ") and "unexpected" not in lines[0] and "Traceback" not in lines[0], lines[0]
    left = sorted(out.iterdir()) if out.is_dir() else None
    assert left == before or [path.name for path in left or ()] == [".loftq"], "nothing looks like a model"
    assert not (source.parent / "harm done").exists()
    return lines[0].removeprefix("loftq: ")


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `...` removes one."""
    values = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def change_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        header, data = header_of(content)
        change(header)
        return with_header(header, data)

    return apply


NORM = "model.norm.weight"
HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated data": (lambda c: c[:-100], "bytes but its header describes"),
    "truncated header": (lambda c: c[:300], "not a complete safetensors file"),
    "trailing bytes": (lambda c: c + b"x", "bytes but its header describes"),
    "100 MB claimed": (lambda c: with_header(*header_of(c), length=100_000_000), "not a complete safetensors file"),
    "exabytes claimed": (lambda c: with_header(*header_of(c), length=2**63), "not a complete safetensors file"),
    "100 MB of blanks": (lambda _: with_header(b" " * 99_999_000, b""), "is damaged"),
    "overlap": (_edit(lambda h: h.update(again=h[NORM])), "overlaps its neighbour"),
    "beyond the end": (_edit(lambda h: h[NORM].update(data_offsets=[2**40, 2**40 + 256])), "leaves a gap"),
    "negative": (_edit(lambda h: h[NORM].update(data_offsets=[-256, 0])), "invalid shape or offsets of"),
    "fractions": (_edit(lambda h: h[NORM].update(data_offsets=[0.0, 256.0])), "invalid shape or offsets of"),
    "true for one": (_edit(lambda h: h[NORM].update(shape=[64, True])), "invalid shape or offsets of"),
    "shape lies": (_edit(lambda h: h[NORM].update(shape=[65])), "256 bytes for shape [65]"),
    "endless shape": (_edit(lambda h: h[NORM].update(shape=[0, 10**30])), "invalid shape or offsets of"),
    "unknown dtype": (_edit(lambda h: h[NORM].update(dtype="F3")), "unknown type 'F3'"),
    "dtype is a list": (_edit(lambda h: h[NORM].update(dtype=["F32"])), "is damaged"),
    "name twice": (lambda c: with_header(json.dumps(header_of(c)[0]).encode()[:-1] + b', "a": 1, "a": 1}', b""), "twi"),
    "half a character": (_edit(lambda h: h.update({"\ud800": h.pop(NORM)})), "is damaged"),
    "deep": (lambda _: with_header(b"[" * 200_000, b""), "is damaged"),
    "a number of 9000 digits": (lambda _: with_header(b'{"a": ' + b"9" * 9000 + b"}", b""), "is damaged"),
    "not a number": (lambda _: with_header(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0]}}', b""), "is"),
    "a pointer of git lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "not a complete safe"),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_safetensors_headers(what: str, source: Path) -> None:
    damage, said = HEADERS[what]
    path = source / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert said in (sentence := refused(source)) and "model.safetensors" in sentence


@pytest.fixture
def sharded(random_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    tensors, index = load_file(random_llama / "model.safetensors"), {}
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(random_llama / "config.json", folder)
    shutil.copy(random_llama / "model.safetensors", tmp_path / "outside.safetensors")
    return folder


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("../outside.safetensors", "not a shard of this directory"),
        ("/etc/passwd", "not a shard of this directory"),
        ("{tmp}/outside.safetensors", "not a shard of this directory"),
        ("sub/../model-00001-of-00002.safetensors", "not a shard of this directory"),
        ("..", "not a shard of this directory"),
        ("", "not a shard of this directory"),
        ("x\n.safetensors", "not a shard of this directory"),
        ("a\x00.safetensors", "not a shard of this directory"),
        ("config.json", "not a shard of this directory"),
        ("model-00003-of-00003.safetensors", "shard model-00003-of-00003.safetensors"),
        ("model-00002-of-00002.safetensors", "which does not hold it"),
        ("link.safetensors", "outside of the model"),
        ("zero.safetensors", "is missing"),
        (7, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_indexes(file: object, said: str, sharded: Path) -> None:
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    (sharded / "zero.safetensors").symlink_to("/dev/zero")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    first = next(name for name, shard in index.items() if "00001" in shard)
    index[first] = file.replace("{tmp}", str(sharded.parent)) if isinstance(file, str) else file
    path.write_text(json.dumps({"weight_map": index}))
    assert said in refused(sharded)


def test_links_out_of_the_model(source: Path) -> None:
    """A clone may hold links, whose targets would be copied and perhaps published."""
    private = source.parent / "private.txt"
    private.write_text("secret")
    for name in ("LICENSE", "tokenizer.json", "config.json", "model.safetensors"):
        copy = shutil.copytree(source, source.parent / f"with {name}")
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(private)
        said = refused(copy)
        assert f"{name} is a link to {private}, outside of the model" in said and "secret" not in said
    (source / "real.json").write_bytes((source / "generation_config.json").read_bytes())
    (source / "tokenizer_config.json").symlink_to("real.json")
    result = typer.testing.CliRunner().invoke(app, ["quantize", str(source), "-o", str(source.parent / "out"), "-q"])
    assert result.exit_code == 0 and not (source.parent / "out" / "tokenizer_config.json").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_things_that_are_no_files(name: str, source: Path) -> None:
    """Reading a pipe would block forever."""
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    if name == "tokenizer.json":  # not copied
        assert typer.testing.CliRunner().invoke(app, ["plan", str(source)]).exit_code == 0
    else:
        refused(source)


def test_missing_tensors(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM" in refused(source)
    rewrite(source / "config.json", num_hidden_layers=3)
    assert "lacks model.layers.1.mlp.up_proj.weight and 7 more" in refused(source)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "shapes contradict": ({"hidden_size": 128}, "expects"),
    "hidden size is a word": ({"hidden_size": "abc"}, "cannot build model type llama"),
    "hidden size is negative": ({"hidden_size": -1}, "cannot build model type llama"),
    "hidden size is a list": ({"hidden_size": [64]}, "cannot build model type llama"),
    "hidden size is endless": ({"hidden_size": 10**12}, "expects"),
    "hidden size is beyond numbers": ({"hidden_size": 10**400}, "cannot build model type llama"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "1000000000, but the checkpoint has too few tensors"),
    "ten thousand layers": ({"num_hidden_layers": 10_000}, "too few tensors"),
    "layers are a word": ({"num_hidden_layers": "two"}, "cannot build model type llama"),
    "unknown model type": ({"model_type": "llamb"}, "model type llamb is unknown to transformers"),
    "model type is a list": ({"model_type": ["llama"]}, "cannot build model type ['llama']"),
    "no model type": ({"model_type": ..., "architectures": ...}, "is unknown to transformers"),
    "another architecture": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "lacks transformer.h.0"),
    "quantized by gptq": ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    "quantization is a list": ({"quantization_config": [1]}, "already quantized"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configs(what: str, source: Path) -> None:
    changes, said = CONFIGS[what]
    rewrite(source / "config.json", **changes)
    assert said in refused(source)


def test_endless_layers_in_other_words(random_llama: Path, tmp_path: Path) -> None:
    """However a config asks for them: T5's decoder, Swin's depths, a mixture's experts."""
    for i, config in enumerate((
        {"model_type": "t5", "num_layers": 1, "num_decoder_layers": 10**9},
        {"model_type": "swin", "depths": [10**9, 2], "num_heads": [1, 1], "embed_dim": 32},
        {"model_type": "resnet", "depths": [10**7] * 4},
        {"model_type": "qwen2", "num_hidden_layers": 10**9},
        {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
    )):  # fmt: skip
        folder = shutil.copytree(random_llama, tmp_path / str(i))
        (folder / "config.json").write_text(json.dumps(config))
        assert "too few tensors" in refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 9_000 + b"}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"hidden_size": 64, "hidden_size": NaN, "model_type": "llama"}', "cannot build"),
    ],
)
def test_configs_that_are_no_config(content: bytes, said: str, source: Path) -> None:
    (source / "config.json").write_bytes(content)
    assert said in refused(source)


def test_a_config_of_gigabytes(source: Path) -> None:
    with open(source / "config.json", "r+b") as handle:
        handle.truncate(5 << 30)
    assert "bytes, too many for such a file" in refused(source)


def test_broken_tokenizer(source: Path) -> None:
    for content in (
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b'{"model": {"vocab": {"a": 1',
        b"<html></html>",
    ):
        (source / "tokenizer.json").write_bytes(content)
        assert "tokenizer.json is truncated or not JSON" in refused(source)


def test_integer_weights(source: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} in model.safetensors is stored as int8" in refused(source)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinity(value: str, source: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(source, lambda tensors: tensors[name].__setitem__((3, 5), float(value)))
    assert f"{name} in model.safetensors holds {value} at [3, 5]" in refused(source)


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_pickles_that_call_anything(index: int, source: Path) -> None:
    """Every kind of call, in every way that pickle offers, in a zip file, in a legacy file and on its own."""
    from support.fuzz_pickles import _legacy, _zip

    class Chosen:
        """Not by chance: call number `index` in way `way`."""

        way = 0

        def choice(self, values: Any) -> Any:
            return values[index] if values is CALLS else values[0]

        def randrange(self, count: int) -> int:
            return self.way % count

        def random(self) -> float:
            return 1.0

    (source / "model.safetensors").unlink()
    mark, rng = source.parent / "harm done", Chosen()
    for rng.way in range(5):
        body = b"\x80\x02}" + b"X\x01\x00\x00\x00a" + call(rng, mark) + b"s."  # type: ignore[arg-type]
        for content in (body, _legacy(body), _zip(rng, body)):  # type: ignore[arg-type]
            (source / "pytorch_model.bin").write_bytes(content)
            refused(source)


def test_pickle_bombs(source: Path) -> None:
    import random

    from support.fuzz_pickles import _zip

    (source / "model.safetensors").unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {bombs(random.Random(seed)) for seed in range(200)}
    assert len(seen) > 15
    for body in seen:
        for content in (b"\x80\x02" + body + b".", _zip(random.Random(0), b"\x80\x02}" + body + b".")):
            (source / "pytorch_model.bin").write_bytes(content)
            refused(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "less than a gigabyte was taken"


def test_the_unpickler_that_streams_is_torch_loads_own() -> None:
    from torch import _weights_only_unpickler

    assert torch.serialization._weights_only_unpickler is _weights_only_unpickler


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.system ['touch {mark}']", "not valid YAML"),
        ("bits: !!python/object/apply:os.system ['touch {mark}']", "not valid YAML"),
        ("model: !!python/object/new:subprocess.Popen [['touch', '{mark}']]", "not valid YAML"),
        ("model: !!python/name:os.system", "not valid YAML"),
        ("bits: !!bool x", "is invalid ("),
        ("bits: 2001-99-99", "is invalid ("),
        ("[" * 5_000, "nested too deeply"),
        ("{a: " * 3_000, "nested too deeply"),
        ("- " * 5_000, "nested too deeply"),
        ("\n".join(" " * i + "a:" for i in range(1_200)), "nested too deeply"),
        ("a" * 2_000_000, "too long"),
        ("bits: *nowhere", "not valid YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nrule: *c", "recipe.yaml, line 1: a recipe has no field 'a'"),
        ("rule: &a [*a]", "is too long or nested too deeply"),
        ("bits: 5.0", "recipe.yaml, line 1: bits cannot be 5"),
        ("bits: [2]", "line 1: bits cannot be [2]"),
        ("bits: true", "line 1: bits cannot be True"),
        ("rank: " + "9" * 4_000, "line 1: rank cannot be"),
        ("rank: 1e3", "line 1: rank cannot be"),
        ("alpha: .nan", "line 1: alpha cannot be nan"),
        ("alpha: true", "line 1: alpha cannot be True"),
        ("max_shard_size: " + "9" * 400 + "GB", "invalid size"),
        ("rule: '(=2'", "invalid regular expression"),
        ('include: "\\ud800"', "include contains an invalid character"),
        ('model: "a\\0b"', "model contains an invalid character"),
        ("- 1", "is not a recipe"),
        ("1: 2", "is not a recipe"),
        ("", "is not a recipe"),
        ("\x00", "not valid YAML"),
    ],
)
def test_recipes(text: str, said: str, source: Path) -> None:
    path = source.parent / "recipe.yaml"
    path.write_text(text.replace("{mark}", str(source.parent / "harm done")))
    result = typer.testing.CliRunner().invoke(
        app, ["quantize", *([] if text.startswith("model") else [str(source)]), "--config", str(path), "-q"]
    )
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and said in lines[0] and "unexpected" not in lines[0], (
        result.output
    )
    assert not (source.parent / "harm done").exists()


@pytest.mark.parametrize("known", [True, False])
def test_remote_code_is_never_imported(known: bool, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = source.parent / "harm done"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "sitecustomize"):
        (source / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...\n")
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    rewrite(source / "config.json", auto_map=auto_map, trust_remote_code=True)
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "tokenization_evil.Evil"}}))
    monkeypatch.chdir(source)
    if not known:
        rewrite(source / "config.json", model_type="evil", architectures=["Evil"])
        assert "model type evil is unknown" in refused(source)
    out = source.parent / "done"
    done = subprocess.run(
        [sys.executable, "-m", "loftq_cli", "quantize", ".", "-o", str(out), "--iters=1", "-q", "--include=*.up_proj"],
        capture_output=True, text=True, timeout=120, check=False, cwd=source,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and (out / "config.json").exists(), done.stderr
    assert not mark.exists() and not any("evil" in name for name in sys.modules)
    # The code that auto_map names comes along as it is, for whoever decides to trust it.
    copied = {path.name: path.read_bytes() for path in out.glob("*.py")}
    assert copied and all(content == (source / name).read_bytes() for name, content in copied.items())


def test_output_is_the_source_or_inside_it(source: Path, tmp_path: Path) -> None:
    for out in (source, source / "out", source.parent):
        assert "overlap: choose another -o" in refused(source, code=2, out=out)
    (tmp_path / "link").symlink_to(source)
    assert "overlap" in refused(source, code=2, out=tmp_path / "link" / "out")
    assert not (source / "out").exists()


def test_output_is_a_file_or_foreign(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert "is a file" in refused(source, code=2, out=tmp_path / "file")
    assert "cannot be written" in refused(source, out=tmp_path / "file" / "below")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_bytes(b"mine")
    for words in ((), ("--overwrite",)):
        assert "files that are not loftq's" in refused(source, *words, code=2, out=tmp_path / "foreign")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "foreign" / "thesis.tex").read_bytes() == b"mine"


def test_output_is_read_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "read-only").mkdir()
    (tmp_path / "read-only").chmod(0o555)
    if os.access(tmp_path / "read-only", os.W_OK):  # root can write everywhere
        mkdir = Path.mkdir

        def refuse(path: Path, *how: Any, **more: Any) -> None:
            if "read-only" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied")
            mkdir(path, *how, **more)

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert "cannot be written (Permission denied): choose another -o" in refused(
        source, out=tmp_path / "read-only" / "out"
    )
    (tmp_path / "read-only").chmod(0o755)


@pytest.mark.parametrize("where", ["weights", "texts", "journal"])
def test_full_disk(where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 4: the same command resumes when there is room."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr("loftq_cli.tensorfile.writer._write_all", full)
        elif where == "texts":
            patch.setattr("loftq_cli.engine.output.directory.write_file", full)
        else:
            patch.setattr("loftq_cli.engine.output.journal.Journal.add", full)
        assert "failed (No space left on device): make room" in refused(source, code=4, out=tmp_path / "out")
    result = typer.testing.CliRunner().invoke(
        app, ["quantize", str(source), "-o", str(tmp_path / "out"), "-q", "--iters", "1"]
    )
    assert result.exit_code == 0 and (tmp_path / "out" / "config.json").exists(), result.output
