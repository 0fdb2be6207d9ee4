"""Which files beside the weights travel with a model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from loftq_cli.checkpoint.base import SideFile
from loftq_cli.checkpoint.local import check_file
from loftq_cli.errors import LoftqError

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
_LEGAL = ("license", "licence", "notice", "use_policy")
# Written anew, or true of the source only.
_NOT_COPIED = (
    "config.json",
    "loftq.json",
    "adapter_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "params.json",
)


def find_side_files(directory: Path) -> tuple[SideFile, ...]:
    """Tokenizer, processor and generation files, licences, sentence-transformers modules; named below `directory`."""
    found = [path for path in sorted(directory.iterdir()) if path.is_file() and travels(path.name)]
    for folder in sentence_transformers_folders(directory):
        found += [path for path in sorted((directory / folder).glob("*.json")) if path.is_file()]
    return tuple(local_file(path, path.relative_to(directory).as_posix()) for path in found)


def local_file(path: Path, name: str) -> SideFile:
    """A file copied unchanged.

    Raises:
        LoftqError: it lies outside of the model, or is JSON that was cut off.
    """
    check_file(path)
    if path.suffix == ".json":
        _check_json(path)
    return SideFile(name, path.stat().st_size, path.read_bytes)


def _check_json(path: Path) -> None:
    """Not a page of errors, a pointer in place of a file or half a download; some are too large to be parsed here."""
    with open(path, "rb") as handle:
        start = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        handle.seek(max(0, path.stat().st_size - 64))
        end = handle.read().rstrip(b" \t\r\n")
    if (start[:1], end[-1:]) not in ((b"{", b"}"), (b"[", b"]")):
        raise LoftqError(f"{path} is cut off or no JSON: download it again.")


def made_file(name: str, content: bytes) -> SideFile:
    """A file whose content the source does not have as such."""
    return SideFile(name, len(content), partial(bytes, content))


def travels(name: str) -> bool:
    """Whether a file of this name at the top of a model is copied."""
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    return name.endswith(_SUFFIXES) or name.lower().startswith(_LEGAL)


def sentence_transformers_folders(directory: Path) -> list[str]:
    """Folders that modules.json names; without them SentenceTransformer cannot open the model."""
    try:
        modules = json.loads((directory / "modules.json").read_bytes())
        names = [str(module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [name for name in names if name not in ("", "..") and Path(name).name == name]
