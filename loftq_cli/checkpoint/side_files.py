"""Files beside the weights that are copied with a model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from loftq_cli.checkpoint.base import SideFile
from loftq_cli.checkpoint.local import check_file
from loftq_cli.errors import LoftqError

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
_LEGAL = ("license", "licence", "notice", "use_policy")
# Written by loftq itself, or valid for the source only.
_NOT_COPIED = (
    "config.json",
    "loftq.json",
    "adapter_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "params.json",
)


def find_side_files(directory: Path) -> tuple[SideFile, ...]:
    """Return a model's tokenizer, processor and generation files, licences and sentence-transformers modules. Names are
    relative to `directory`."""
    found = [path for path in sorted(directory.iterdir()) if path.is_file() and travels(path.name)]
    for folder in sentence_transformers_folders(directory):
        found += [path for path in sorted((directory / folder).glob("*.json")) if path.is_file()]
    return tuple(local_file(path, path.relative_to(directory).as_posix()) for path in found)


def local_file(path: Path, name: str) -> SideFile:
    """Return a file that is copied unchanged.

    Raises:
        LoftqError: it lies outside of the model, or is truncated JSON.
    """
    check_file(path)
    if path.suffix == ".json":
        _check_json(path)
    return SideFile(name, path.stat().st_size, path.read_bytes)


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
    return SideFile(name, len(content), partial(bytes, content))


def travels(name: str) -> bool:
    """True if a file of this name at the top of a model is copied."""
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    return name.endswith(_SUFFIXES) or name.lower().startswith(_LEGAL)


def sentence_transformers_folders(directory: Path) -> list[str]:
    """Return the folders that modules.json names; SentenceTransformer cannot open the model without them."""
    try:
        modules = json.loads((directory / "modules.json").read_bytes())
        names = [str(module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [name for name in names if name not in ("", "..") and Path(name).name == name]
