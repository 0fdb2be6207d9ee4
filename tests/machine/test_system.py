"""Windows is refused in one sentence, and what only Linux has is not needed on macOS."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.errors import LoftqError
from loftq_cli.machine import system, usage

# What CPython for Windows lacks.
WITHOUT_POSIX = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
import os
for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "pread", "preadv", "pwrite", "fdatasync",
             "sched_getaffinity", "posix_fadvise", "sysconf", "getuid"):
    delattr(os, name)
import loftq_cli.cli
sys.platform = "win32"
"""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["quantize", "model", "-o", "out"], ["plan"]])
def test_every_command_on_windows_ends_in_one_sentence(arguments: list[str], tmp_path: Path) -> None:
    program = f"{WITHOUT_POSIX}\nsys.argv = ['loftq', *{arguments!r}]\nloftq_cli.cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    sentence = "loftq runs on Linux and macOS, not on Windows itself: run `wsl --install`, then use loftq in WSL."
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"loftq: {sentence}\n")
    assert not list(tmp_path.iterdir())


def test_the_library_on_windows_says_the_same() -> None:
    program = f"""{WITHOUT_POSIX}
try:
    loftq_cli.quantize
except loftq_cli.LoftqError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("loftq runs on Linux and macOS") and done.stdout.count("\n") == 1, done.stderr


@pytest.mark.parametrize("platform", ["linux", "darwin", "cygwin"])
def test_other_systems_are_not_refused(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    system.check_system()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(LoftqError, match="WSL"):
        system.check_system()


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process without what CPython for macOS lacks, and without /proc."""
    for name in ("preadv", "fdatasync", "sched_getaffinity", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.libc_ver", lambda *a, **k: ("", ""))
    read, link = Path.read_text, os.readlink

    def read_text(path: Path, *args: object, **options: object) -> str:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return read(path, *args, **options)  # type: ignore[arg-type]

    def readlink(path: object, *args: object, **options: object) -> str:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return link(path, *args, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "readlink", readlink)


def test_a_conversion_on_macos_writes_the_same_bytes(
    random_llama: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loftq_cli.tensorfile.writer as writer

    recipe = {"bits": 2, "rank": 4, "iters": 1, "device": "cpu"}
    loftq_cli.quantize(random_llama, output=tmp_path / "linux", **recipe)
    request.getfixturevalue("macos")
    monkeypatch.setattr(writer, "_flush", os.fsync)
    monkeypatch.setattr(writer, "_MOST_AT_ONCE", 1000)
    loftq_cli.quantize(random_llama, output=tmp_path / "macos", **recipe)
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (tmp_path / "linux" / name).read_bytes() == (tmp_path / "macos" / name).read_bytes()
    assert load_file(tmp_path / "macos" / "model.safetensors")
    assert loftq_cli.verify(tmp_path / "macos", source=random_llama).ok


def test_the_writer_flushes_with_fsync_where_there_is_no_fdatasync(macos: None) -> None:
    import loftq_cli.tensorfile.writer as writer

    try:
        assert importlib.reload(writer)._flush is os.fsync
    finally:
        os.fdatasync = os.fsync  # type: ignore[attr-defined]  # the fixture restores the real one
        importlib.reload(writer)


def test_memory_is_measured_without_proc(macos: None) -> None:
    import psutil

    held = torch.ones(50 << 20, dtype=torch.uint8)
    assert abs(usage.resident_memory() - psutil.Process().memory_info().rss) < 64 << 20
    assert usage.peak_memory() > 0 and held[0] == 1


def test_cores_are_counted_without_affinity(macos: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.batches.child import _environment

    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert system.usable_cores() == 12 and _environment(3)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.usable_cores() == 1


def test_files_are_read_without_preadv(macos: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    handle, target = os.open(tmp_path / "file", os.O_RDONLY), bytearray(64)
    try:
        assert system.read_at(handle, memoryview(target), 50) == 50 and target[:50] == bytes(range(50, 100))
        assert system.read_at(handle, memoryview(target), 100) == 0
    finally:
        os.close(handle)
