"""Checkpoints of the exact shapes of published models, without their weights: a config and sparse files."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from loftq_cli.formats.base import DTYPES
from loftq_cli.tensorfile.layout import lay_out
from loftq_cli.tensorfile.tensors import OutputTensor
from support.paths import TESTS

CONFIGS = TESTS / "data" / "shapes"
_ROOT = tempfile.TemporaryDirectory(prefix="loftq-shapes-")  # removed when the interpreter ends


@functools.cache
def shape_only(model: str) -> Path:
    """Return a directory that looks like a download of `org/name`, with sparse files in place of the weights."""
    config = json.loads((CONFIGS / f"{model.replace('/', '--')}.json").read_text())
    path = Path(_ROOT.name) / model
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors = [OutputTensor(name, DTYPES[config["dtype"]], shape) for name, shape in _shapes(config).items()]
    file = lay_out("model.safetensors", tensors, {"format": "pt"})
    with open(path / file.name, "wb") as handle:
        handle.write(file.header)
        handle.truncate(file.nbytes)
    return path


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names on disk → shapes, as transformers saves the model's class."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    loaded = transformers.AutoConfig.for_model(**config)
    name = next(iter(config.get("architectures", ())), "AutoModel")
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls.from_config(loaded) if name.startswith("Auto") else cls(loaded)
    tied = set(model.all_tied_weights_keys)
    weights = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    return {key: tuple(tensor.shape) for key, tensor in revert_weight_conversion(model, weights).items()}
