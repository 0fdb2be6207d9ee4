"""Second moments of the inputs of linear layers, collected while a model runs block by block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from loftq_cli.errors import LoftqError

KINDS = ("diagonal", "full")
_FORMAT = "loftq second moments 1"


@dataclass(frozen=True)
class Moments:
    """A file written by `write_moments`; tensors are read on demand.

    Attributes:
        about: its metadata: kind, tokens, text_sha256 and more.
        shared: module -> the module whose tensor it shares.
    """

    file: Path
    about: Mapping[str, str]
    shared: Mapping[str, str]

    def of(self, module: str, kind: str) -> Tensor | None:
        """Return the second moment of a module's inputs, the diagonal [in] or the matrix [in, in]; None if unknown."""
        if module not in self.shared:
            return None
        with safe_open(self.file, framework="pt") as opened:
            moment = opened.get_tensor(self.shared[module])
        return moment.diagonal().clone() if kind == "diagonal" and moment.ndim == 2 else moment


def open_moments(file: Path) -> Moments:
    """Read the header of a file of second moments.

    Raises:
        LoftqError: it is not such a file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
        if about.get("format") == _FORMAT:
            return Moments(file, about, json.loads(about["shared"]))
    except Exception as error:  # safetensors raises its own types
        raise LoftqError(f"{file} cannot be read as second moments ({error}): collect them again.") from error
    raise LoftqError(f"{file} holds no second moments: give a text, or a file that --calibrate wrote.")
