"""Every family of `families` as a directory on disk, written once per test run by transformers itself."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from support.families import FAMILIES

_ROOT = tempfile.TemporaryDirectory(prefix="loftq-families-")  # removed when the interpreter ends


@dataclass(frozen=True)
class Saved:
    """A saved model; tests must not change the model or the files.

    Attributes:
        folder: config.json and model.safetensors, under the family's original names.
        config: config.json, parsed.
        shapes: names on disk -> shapes, in the order of the header.
    """

    model: PreTrainedModel
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


@functools.cache
def saved(name: str) -> Saved:
    """Return the checkpoint of one family."""
    return save(FAMILIES[name](), Path(_ROOT.name) / name)


def save(model: PreTrainedModel, folder: Path) -> Saved:
    """Write a model and read its header back."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Saved(model, folder, json.loads((folder / "config.json").read_text()), shapes)
