"""Find out by a trial run with zeros how a model can be run: block by block or whole, its head separately or not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq_cli.checkpoint import Checkpoint
from loftq_cli.checkpoint.local import ADAPTER_CONFIG
from loftq_cli.errors import LoftqError
from loftq_cli.forward.blocks import find_blocks
from loftq_cli.forward.parameters import LoadedParameters, Parameters, Share
from loftq_cli.forward.streamed import Batch, StreamedModel
from loftq_cli.machine.confined import real_path
from loftq_cli.modules.build import build_empty, load_whole
from loftq_cli.modules.experts import find_expert, is_expert
from loftq_cli.modules.names import RuntimeName, runtime_names
from loftq_cli.modules.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOWS, _TOKENS, _PIECE = 3, 4, 2  # different numbers of windows and positions, and more than one piece
_CPU = torch.device("cpu")


def open_model(checkpoint: Checkpoint, device: torch.device) -> StreamedModel:
    """Build the model of a checkpoint, without weights until `load`.

    The model is held whole (`blocks` is empty) if a block is not called as a module, if its arguments cannot be split
    into windows, or if transformers rearranges the checkpoint's tensors.

    Raises:
        LoftqError: transformers cannot build the model, or it does not run on tokens alone.
    """
    empty = build_empty(checkpoint.config)
    names, _ = runtime_names(empty, list(checkpoint.tensors))
    experts = _rearranged_experts(empty, checkpoint, names)
    rearranged = any(name.merged and tensor not in experts for tensor, name in names.items())
    trial = _Trial(checkpoint, names, experts)
    blocks = not rearranged and trial.failure(_run_all, streams=True) is None
    if not blocks:
        failure = trial.failure(_run_all, streams=False)
        if failure is not None:
            cause = " ".join(str(failure).split())[:200]
            raise LoftqError(
                f"{type(empty).__name__} cannot be run on text alone ({type(failure).__name__}: {cause})."
            ) from failure
    splits = empty.base_model is not empty
    splits = splits and trial.failure(_run_split, streams=blocks, splits=True) is None
    model = _load_base(type(empty), checkpoint.path) if rearranged else empty
    return _streamed(model, Parameters(model, names, experts, device), device, streams=blocks, splits=splits)


def hold_model(model: PreTrainedModel, device: torch.device) -> StreamedModel:
    """Return a model that has been loaded already, with whatever layers it has; `load` changes nothing."""
    return _streamed(model.eval(), LoadedParameters(), device, streams=False, splits=False)


def _load_base(model_class: type[PreTrainedModel], path: Path) -> PreTrainedModel:
    """Load the model without the PEFT adapter that may lie beside it, which transformers would load as well."""
    if not (path / ADAPTER_CONFIG).exists():
        return load_whole(model_class, path)
    with tempfile.TemporaryDirectory(prefix="loftq-base-") as folder:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(real_path(file))
        return load_whole(model_class, Path(folder))


def _rearranged_experts(
    model: PreTrainedModel, checkpoint: Checkpoint, names: Mapping[str, RuntimeName]
) -> dict[str, Share]:
    """Return each expert tensor's part in a parameter of the model, if the model lays experts out unlike the disk."""
    if not any(name.merged for name in names.values()):
        return {}
    view, found = ModelView.of(model), {}
    for tensor, name in names.items():
        path = (name.key or "").rpartition(".")[0]
        if name.merged and name.key and is_expert(view, name, path):
            shape = tuple(checkpoint.tensors[tensor].shape)
            expert = find_expert(view, name, path, shape)
            if expert is not None:
                transposed = expert.transposed != bool(getattr(view.modules[path], "is_transposed", False))
                found[tensor] = Share(expert, transposed)
    return found


def _streamed(
    model: PreTrainedModel,
    parameters: Parameters,
    device: torch.device,
    *,
    streams: bool,
    splits: bool,
    piece: int | None = None,
) -> StreamedModel:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config.use_cache = False  # submodules may have their own copies of the config
    blocks: Mapping[str, nn.Module] = find_blocks(model) if streams else {}
    return StreamedModel(model, parameters, blocks, device, splits=splits, piece=piece)


@dataclass(frozen=True)
class _Trial:
    """Trial runs of the model with zeros as weights, which take no memory."""

    checkpoint: Checkpoint
    names: Mapping[str, RuntimeName]
    experts: Mapping[str, Share]

    def failure(
        self, run: Callable[[StreamedModel, Batch], None], *, streams: bool, splits: bool = False
    ) -> Exception | None:
        """Return the exception that a run raises, or None."""
        empty = build_empty(self.checkpoint.config)
        parameters = Parameters(empty, self.names, self.experts, _CPU)
        model = _streamed(empty, parameters, _CPU, streams=streams, splits=splits, piece=_PIECE)
        ids = torch.arange(_WINDOWS * _TOKENS).reshape(_WINDOWS, _TOKENS) % 8 + 1
        batch = {"input_ids": ids}
        if model.model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        try:
            model.load(model.parameters.zeros())
            run(model, batch)
        except Exception as error:  # a model's own code may raise anything
            return error
        return None


def _run_all(model: StreamedModel, batch: Batch) -> None:
    model.run(batch, head=True)


def _run_split(model: StreamedModel, batch: Batch) -> None:
    """Run the head on the base model's output; there must be as many logits as positions."""
    found = sum(len(logits) for _, logits in model.logits(batch))
    assert found == _WINDOWS * _TOKENS, "one row of logits for every position"
