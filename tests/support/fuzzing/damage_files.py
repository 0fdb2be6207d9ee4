"""Files that are gone, empty, folders, links, pipes, or something else."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

HUGE = 1 << 40  # bytes of a file with nothing in it
_ODD_FILES = ("\x1b[31m.txt", "\u202egnp.json", "a\nb.txt", "[red]x[/].md", "x" * 250, ".loftq", "loftq_init/x.txt")


def files_below(folder: Path) -> list[Path]:
    """Return the regular files of a folder and of the folders in it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def damage_files(rng: random.Random, folder: Path) -> str:
    """Damage one file of a folder, or a folder in it, and return the kind of damage. `folder.parent` is the case's."""
    how = rng.randrange(13)
    if how >= 11:
        return _damage_folder(rng, folder)
    path = rng.choice(files_below(folder))
    if how == 10:
        return _add_odd_file(rng, folder)
    content = path.read_bytes()
    path.unlink()
    return _replace(rng, path, content, how)


def _replace(rng: random.Random, path: Path, content: bytes, how: int) -> str:
    """Put something else in the place of a file."""
    if how == 0:
        path.mkdir()
        return "a folder in place of a file"
    if how == 1:
        path.write_bytes(b"")
        return "an empty file"
    if how == 2:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        return "an LFS pointer"
    if how in (3, 4):
        aims = ("/etc/passwd", "/dev/zero", "/dev/null", path.name, "../outside.txt", "/", "../../outside.txt")
        path.symlink_to(rng.choice(aims))
        return "a link in place of a file"
    if how == 5:
        os.mkfifo(path)
        return "a FIFO in place of a file"
    if how == 6:
        path.write_bytes(b"<html>404</html>")
        return "a page in place of a file"
    if how == 7:
        (path.parent / f"{path.name}.bak").write_bytes(content)
        return "a missing file"
    if how == 8:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
        return "a truncated file"
    path.write_bytes(content)
    os.truncate(path, HUGE)
    return "a file of a terabyte"


def _add_odd_file(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice(_ODD_FILES)
    path.parent.mkdir(exist_ok=True)
    if rng.random() < 0.3 and not path.exists():
        os.mkfifo(path)
        return "a FIFO beside the files"
    if not path.exists():
        path.write_bytes(b"x")
    return "an odd file name"


def _damage_folder(rng: random.Random, folder: Path) -> str:
    """A folder that is a link to one outside, or is missing; or files in a new one."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    if not inner:
        (folder / "extra").symlink_to(rng.choice(("/etc", "..", ".", "../nowhere")))
        return "a link beside the files"
    path = rng.choice(inner)
    if rng.random() < 0.3:
        shutil.rmtree(path)
        return "a missing folder"
    elsewhere = folder.parent / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return "a link in place of a folder"
