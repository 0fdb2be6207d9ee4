"""Decide how a model can be run: block by block, or whole; its head apart, or not. A trial with zeros tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq_cli.checkpoint import Checkpoint
from loftq_cli.errors import LoftqError
from loftq_cli.forward.blocks import find_blocks
from loftq_cli.forward.parameters import Parameters
from loftq_cli.forward.streamed import Batch, StreamedModel
from loftq_cli.module_build import RuntimeName, build_empty, load_whole, runtime_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOWS, _TOKENS, _PIECE = 3, 4, 2  # windows and positions differ in number, and not all windows go at once
_CPU = torch.device("cpu")


def open_model(checkpoint: Checkpoint, device: torch.device) -> StreamedModel:
    """The model of a checkpoint, without weights until `load`.

    Where a block is not called as a module, or takes what cannot be cut into windows, or where transformers rearranges
    the checkpoint's tensors, the model is held whole (`blocks` is empty).

    Raises:
        LoftqError: transformers cannot build the model, or it does not run on tokens alone.
    """
    empty = build_empty(checkpoint.config)
    names, _ = runtime_names(empty, list(checkpoint.tensors))
    rearranged = any(name.merged for name in names.values())
    blocks = not rearranged and _fails(_trial_model(checkpoint, names, streams=True), _run_all) is None
    if not blocks:
        failure = _fails(_trial_model(checkpoint, names, streams=False), _run_all)
        if failure is not None:
            cause = " ".join(str(failure).split())[:200]
            raise LoftqError(
                f"{type(empty).__name__} cannot be run on text alone ({type(failure).__name__}: {cause})."
            ) from failure
    splits = empty.base_model is not empty
    splits = splits and _fails(_trial_model(checkpoint, names, streams=blocks, splits=True), _run_split) is None
    model = load_whole(type(empty), checkpoint.path) if rearranged else empty
    return _streamed(model, names, device, streams=blocks, splits=splits)


def _streamed(
    model: PreTrainedModel,
    names: Mapping[str, RuntimeName],
    device: torch.device,
    *,
    streams: bool,
    splits: bool,
    piece: int | None = None,
) -> StreamedModel:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config.use_cache = False  # parts of a model may have copies of their own
    blocks: Mapping[str, nn.Module] = find_blocks(model) if streams else {}
    return StreamedModel(model, Parameters(model, names, device), blocks, device, splits=splits, piece=piece)


def _trial_model(
    checkpoint: Checkpoint, names: Mapping[str, RuntimeName], *, streams: bool, splits: bool = False
) -> StreamedModel:
    return _streamed(build_empty(checkpoint.config), names, _CPU, streams=streams, splits=splits, piece=_PIECE)


def _fails(model: StreamedModel, run: Callable[[StreamedModel, Batch], None]) -> Exception | None:
    ids = torch.arange(_WINDOWS * _TOKENS).reshape(_WINDOWS, _TOKENS) % 8 + 1
    batch = {"input_ids": ids}
    if model.model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    try:
        model.load(model.parameters.nothing())
        run(model, batch)
    except Exception as error:  # whatever a model's own code may raise
        return error
    return None


def _run_all(model: StreamedModel, batch: Batch) -> None:
    model.run(batch, head=True)


def _run_split(model: StreamedModel, batch: Batch) -> None:
    """The head on what the base model gave: as many logits as positions."""
    found = sum(len(logits) for _, logits in model.logits(batch))
    assert found == _WINDOWS * _TOKENS, "one row of logits for every position"
