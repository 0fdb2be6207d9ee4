"""Checkpoint sources: open a checkpoint by reading its headers, then read one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.base import Checkpoint, SideFile, TensorInfo
from loftq_cli.checkpoint.local import adapter_base
from loftq_cli.checkpoint.meta.checkpoint import MetaCheckpoint, find_meta, open_meta
from loftq_cli.checkpoint.pickled import has_pickles, open_pickled
from loftq_cli.checkpoint.safetensors import has_safetensors, open_safetensors
from loftq_cli.checkpoint.scaled import with_scales
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.machine.confined import real_path, user_path

if TYPE_CHECKING:
    from loftq_cli.checkpoint.remote.model import HubModel
    from loftq_cli.recipe.model import Recipe

__all__ = ["Checkpoint", "SideFile", "TensorInfo", "open_checkpoint", "open_source"]

_FOREIGN = ("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.ckpt*", "*.npz", "*.pth", "*.pt", "*.bin")


@contextmanager
def open_source(recipe: Recipe, *, stream: bool = False, weights: bool = True) -> Iterator[tuple[Checkpoint, Recipe]]:
    """Open the checkpoint that a recipe names and yield it with the recipe, in which a Hub model is pinned to a commit.

    Args:
        stream: read a model on the Hub by range requests without keeping a copy.
        weights: True if weights will be read; a model on the Hub is not downloaded just for its headers.

    Raises:
        UsageError: a revision or `stream` is given for a directory.
        LoftqError: the checkpoint does not exist or cannot be read.
    """
    local = user_path(recipe.model)
    source: Path | HubModel = local
    if recipe.revision is not None or not local.exists():
        # Imports huggingface_hub, which a model on this machine does not need.
        from loftq_cli.checkpoint.remote.model import open_hub, parse_model

        source = parse_model(recipe.model, recipe.revision)
    if isinstance(source, Path):
        if stream and local.exists():
            raise UsageError(f"--stream is for a model on the Hub, but {recipe.model} is a local path: leave it out.")
        checkpoint = open_checkpoint(source, recipe.meta_version)
    else:
        checkpoint, commit = open_hub(
            source,
            lambda path: open_checkpoint(path, recipe.meta_version),
            stream=stream,
            weights=weights,
            meta_version=recipe.meta_version,
        )
        if not isinstance(checkpoint, MetaCheckpoint):
            _refuse_meta_version(recipe.model, recipe.meta_version)
        recipe = dataclasses.replace(recipe, model=commit.repo, revision=commit.revision)
    try:
        yield checkpoint, recipe
    finally:
        checkpoint.close()


def open_checkpoint(model: str | Path, meta_version: str = "auto") -> Checkpoint:
    """Open the checkpoint in a directory without reading any weights.

    If a directory contains several formats, safetensors take precedence over pickles, and both over Meta's files. FP8
    and MXFP4 weights are presented as the bfloat16 weights they represent.

    Args:
        meta_version: the Llama version of Meta's files; "auto" infers it.

    Raises:
        LoftqError: the directory does not exist, contains no checkpoint, or the headers are damaged.
        UsageError: a version is given for a checkpoint that is not in Meta's format.
    """
    path = user_path(model)
    if not path.exists():
        raise LoftqError(
            f"there is no directory {path}: give the path of a checkpoint, or org/name for a model on the Hub."
        )
    if not path.is_dir():
        raise LoftqError(f"{path} is a file: give the directory that contains it and its config.json.")
    try:
        return with_scales(_open(real_path(path), meta_version))
    except OSError as error:
        raise LoftqError(f"{path} cannot be read ({error.strerror}): check the files and their permissions.") from error


def _open(path: Path, meta_version: str) -> Checkpoint:
    plain = has_safetensors(path) or has_pickles(path)
    meta = find_meta(path)
    if meta is not None and (not plain or not (path / "config.json").is_file()):
        return open_meta(path, meta, meta_version)
    _refuse_meta_version(path, meta_version)
    if has_safetensors(path):
        return open_safetensors(path)
    if has_pickles(path):
        return open_pickled(path)
    base = adapter_base(path)
    if base is not None:
        raise LoftqError(
            f"{path} is a PEFT adapter of {base:.200}: give that model, or merge the adapter into it first."
        )
    foreign = sorted(found.name for pattern in _FOREIGN for found in path.glob(pattern))
    only = f", only {foreign[0]}, which loftq does not read" if foreign else ""
    raise LoftqError(
        f"{path} contains no *.safetensors, pytorch_model*.bin or Meta's consolidated.*.pth with params.json{only}: "
        "give the directory of a downloaded checkpoint."
    )


def _refuse_meta_version(model: str | Path, meta_version: str) -> None:
    if meta_version != "auto":
        raise UsageError(
            f"--meta-version is for Meta's consolidated.*.pth, which {model} does not contain: leave it out."
        )
