"""Sources: open a checkpoint by its headers, then read one tensor at a time."""

from __future__ import annotations

import re
from pathlib import Path

from loftq_cli.checkpoint.base import Checkpoint, TensorInfo
from loftq_cli.checkpoint.safetensors import open_safetensors
from loftq_cli.errors import LoftqError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open the checkpoint in a directory without reading a weight.

    Raises:
        LoftqError: there is no such directory, it holds no checkpoint, or its headers are damaged.
    """
    path = Path(model).expanduser()
    if not path.exists():
        hint = f"run `hf download {model}` first and give the directory it prints"
        known = "give the path of a downloaded checkpoint"
        raise LoftqError(f"there is no directory {path}: {hint if _like_a_hub_id(str(model)) else known}.")
    if not path.is_dir():
        raise LoftqError(f"{path} is a file: give the directory that holds it and its config.json.")
    return open_safetensors(path.resolve())


def _like_a_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not model.startswith(".")
