"""Which files beside the weights travel with a model."""

from __future__ import annotations

import json
from pathlib import Path

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
_LEGAL = ("license", "licence", "notice", "use_policy")
# Written anew, or true of the source only.
_NOT_COPIED = ("config.json", "loftq.json", "adapter_config.json", "quantize_config.json", "params.json")


def find_side_files(directory: Path) -> tuple[Path, ...]:
    """Tokenizer, processor and generation files, licences, sentence-transformers modules; relative to `directory`."""
    found = [path for path in sorted(directory.iterdir()) if path.is_file() and _travels(path.name)]
    for folder in _sentence_transformers_folders(directory):
        found += [path for path in sorted(folder.glob("*.json")) if path.is_file()]
    return tuple(path.relative_to(directory) for path in found)


def _travels(name: str) -> bool:
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    return name.endswith(_SUFFIXES) or name.lower().startswith(_LEGAL)


def _sentence_transformers_folders(directory: Path) -> list[Path]:
    """Folders that modules.json names; without them SentenceTransformer cannot open the model."""
    try:
        modules = json.loads((directory / "modules.json").read_bytes())
        names = [str(module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [directory / name for name in names if name and Path(name).name == name and (directory / name).is_dir()]
