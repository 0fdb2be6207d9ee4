"""Sources: open a checkpoint by its headers, then read one tensor at a time."""

from __future__ import annotations

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
        raise LoftqError(f"there is no directory {path}: give the path of a downloaded checkpoint.")
    if not path.is_dir():
        raise LoftqError(f"{path} is a file: give the directory that holds it and its config.json.")
    return open_safetensors(path.resolve())
