"""Files beside the weights that are copied with a model."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from loftq_cli.checkpoint.base import SideFile
from loftq_cli.checkpoint.local import check_file, locate
from loftq_cli.checkpoint.read_by_classes import code_is_named, names_in_code
from loftq_cli.errors import LoftqError
from loftq_cli.formats.adapter import FOLDER as ADAPTER_FOLDER
from loftq_cli.machine.confined import check_name

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
_LEGAL = ("license", "licence", "notice", "use_policy")
# Written by loftq itself, or valid for the source only.
_NOT_COPIED = frozenset(
    {
        "config.json",
        "readme.md",
        "loftq.json",
        "loftq.yaml",
        "loftq_merge.json",
        "adapter_config.json",
        "quantize_config.json",
        "hf_quant_config.json",
        "params.json",
    }
)
_WEIGHTS = (
    "*.safetensors", "*.index.json", "pytorch_model*", "tf_model*", "flax_model*", "adapter_model*", "consolidated.*",
    "*.gguf", "*.onnx", "*.h5", "*.msgpack",
)  # fmt: skip
_CHAT_TEMPLATES = "additional_chat_templates"  # transformers keeps all but the default template there
_LISTED = 10_000  # files in the folders of a model
_MODULES_BYTES = 1 << 20
_LONGEST_NAME = 255  # bytes, on the common file systems


def find_side_files(directory: Path) -> tuple[SideFile, ...]:
    """Return the files beside a model's weights that transformers and sentence-transformers read, and its licences.

    Names are relative to `directory`.

    Raises:
        LoftqError: one of them lies outside of the model, is damaged, or has a name that loftq needs.
    """
    names = companions(directory, _listing(directory))
    return tuple(local_file(directory / name, name) for name in sorted(names, key=lambda name: ("/" in name, name)))


def companions(directory: Path, names: Iterable[str]) -> list[str]:
    """Select from the names of a model's files those that are copied.

    Args:
        directory: holds the model's JSON files; the others may be on the Hub.
        names: relative to the model, in any order.

    Raises:
        LoftqError: modules.json names a folder that loftq writes itself.
    """
    folders = {*module_folders(directory), _CHAT_TEMPLATES}
    in_code, code = cache(lambda: names_in_code(directory)), code_is_named(directory)  # imports transformers: if needed
    found = []
    for name in names:
        top, _, below = name.partition("/")
        if below:
            copied = top in folders and not any(part.startswith(".") for part in below.split("/"))
        else:
            copied = travels(name) or (_may_travel(name) and ((code and name.endswith(".py")) or name in in_code()))
        if copied:
            found.append(name)
    return found


def left_behind(directory: Path, weights: Iterable[str], names: Iterable[str] | None = None) -> list[str]:
    """Return the names of the files and folders at the top of a model that are not copied.

    Args:
        weights: the files that are read.
        names: of all files of a model on the Hub, of which `directory` holds only some; None for those in `directory`.
    """
    listed = sorted(_top(directory) if names is None else names)
    known = {*weights, *companions(directory, listed if names is not None else _listing(directory))}
    folders = {name.partition("/")[0] for name in known if "/" in name}
    found = (name if not below else f"{name}/" for name, _, below in (one.partition("/") for one in listed))
    return [
        name
        for name in dict.fromkeys(found)
        if name not in known
        and name.rstrip("/") not in folders
        and name.lower() not in _NOT_COPIED
        and not name.startswith(".")
        and not name.endswith(".index.json")
    ]


def _top(directory: Path) -> Iterator[str]:
    """Yield the files of a model at its top, and `FOLDER/…` for the folders."""
    for path in directory.iterdir():
        if path.is_file():
            yield path.name
        elif path.is_dir():
            yield f"{path.name}/…"


def local_file(path: Path, name: str) -> SideFile:
    """Return a file that is copied unchanged; `path` ends in `name`, or in the last part of it.

    Raises:
        LoftqError: it lies outside of the model, or is truncated JSON.
    """
    root = path.parents[name.count("/")]
    folder, inside = locate(root, path.relative_to(root).as_posix())
    check_file(path)
    if path.suffix == ".json":
        _check_json(path)
    return SideFile(name, path.stat().st_size, lambda: folder.read(inside))


def _check_json(path: Path) -> None:
    """Refuse error pages, Git LFS pointers and partial downloads by the first and last character. Some files are too
    large to be parsed here."""
    with open(path, "rb") as handle:
        start = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        handle.seek(max(0, path.stat().st_size - 64))
        end = handle.read().rstrip(b" \t\r\n")
    if (start[:1], end[-1:]) not in ((b"{", b"}"), (b"[", b"]")):
        raise LoftqError(f"{path} is truncated or not JSON: download it again.")


def made_file(name: str, content: bytes) -> SideFile:
    """Return a file with generated content."""
    return SideFile(name, len(content), lambda: io.BytesIO(content))


def travels(name: str) -> bool:
    """True if a file of this name at the top of a model is copied, whatever the model."""
    return _may_travel(name) and (name.endswith(_SUFFIXES) or name.lower().startswith(_LEGAL))


def _may_travel(name: str) -> bool:
    known = name.lower() in _NOT_COPIED or any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)
    return not known and not name.startswith(".")


def module_folders(directory: Path) -> list[str]:
    """Return the folders that modules.json names; SentenceTransformer cannot open the model without them.

    Raises:
        LoftqError: a folder has a name that loftq needs in the output, or one that no folder can have.
    """
    path = directory / "modules.json"
    try:
        check_file(path)
        if path.stat().st_size > _MODULES_BYTES:
            return []
        names = [module["path"] for module in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    found = []
    for name in names:
        try:
            first = check_name(str(name).rstrip("/"), path)[0]
        except LoftqError:
            continue  # the model itself, or a place outside of it
        if first.startswith(".") or first.lower() == ADAPTER_FOLDER:
            raise LoftqError(f"{path} names the folder {first!r:.120}, which loftq needs itself: rename it there.")
        if len(first.encode("utf-8", "replace")) > _LONGEST_NAME:
            raise LoftqError(f"{path} names a folder of {len(first)} characters, which is too long: correct it there.")
        found.append(first)
    return found


def _listing(directory: Path) -> Iterator[str]:
    """Yield the names of the files at the top of a model, and below the folders that are copied.

    Raises:
        LoftqError: a folder is a link, or the folders hold too many files.
    """
    yield from sorted(
        path.name for path in directory.iterdir() if path.is_file() or (path.is_symlink() and travels(path.name))
    )
    count = 0
    for folder in dict.fromkeys((*module_folders(directory), _CHAT_TEMPLATES)):
        if (directory / folder).is_symlink():
            locate(directory, f"{folder}/x")  # refuses
        for place, folders, files in os.walk(directory / folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in (*folders, *files):
                relative = (Path(place) / name).relative_to(directory).as_posix()
                count += 1
                if count > _LISTED:
                    raise LoftqError(
                        f"{directory / folder} holds more than {_LISTED} files: remove what is not needed."
                    )
                if name in folders:
                    locate(directory, f"{relative}/x")  # refuses links to folders
                elif not name.startswith("."):
                    yield relative
