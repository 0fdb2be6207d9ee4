"""Open the models that one evaluation compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq_cli.artifacts.manifest import NAME, KeptRecord, Manifest, MatrixRecord, read_manifest
from loftq_cli.artifacts.origin import opened_source
from loftq_cli.calibration.calibrate import source_tokenizer
from loftq_cli.checkpoint import open_source
from loftq_cli.checkpoint.quantized import quantization_method
from loftq_cli.checkpoint.remote.model import fetch_conversion, parse_model
from loftq_cli.checkpoint.safetensors import open_safetensors
from loftq_cli.checkpoint.trained_on import check_trained_on, conversion_in
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.forward.opening import hold_model, open_model
from loftq_cli.forward.streamed import StreamedModel
from loftq_cli.forward.text import open_tokenizer
from loftq_cli.forward.weights import BackboneWeights, LoadedWeights, PlainWeights, SourceWeights, Weights
from loftq_cli.machine.confined import user_path
from loftq_cli.merging.places import find_places, name_of_expert
from loftq_cli.merging.saved_tensors import SavedTensor, find_saved
from loftq_cli.merging.texts import RECORD
from loftq_cli.merging.trained_adapter import Place, TrainedAdapter, read_adapter
from loftq_cli.recipe.model import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """One model to score: `weights` in `model`, which several subjects may share."""

    model: StreamedModel
    weights: Weights


@dataclass(frozen=True)
class Request:
    """What is evaluated, as the user named it.

    Attributes:
        model: a directory, or a model on the Hub.
        source: the full-precision model; None for the one a conversion records.
        adapter: a trained adapter, or None.
        force: use an adapter that was trained on another conversion.
        noted: receives notes about the adapter.
    """

    model: str
    source: str | None
    adapter: Path | None
    force: bool
    device: torch.device
    noted: Callable[[str], None]


@dataclass(frozen=True)
class Subjects:
    """The models to score by their names in `scores.MODELS`, in order.

    Attributes:
        source: the full-precision model that they are compared with, for the report; None for none.
    """

    models: Mapping[str, Subject]
    tokenizer: PreTrainedTokenizerBase
    source: str | None

    @property
    def last(self) -> Subject:
        return list(self.models.values())[-1]


@contextmanager
def opened_subjects(asked: Request) -> Iterator[Subjects]:
    """Open a conversion with its source, or any other model.

    Raises:
        LoftqError: it cannot be read, does not run on text, or the adapter does not belong to it.
    """
    path = user_path(asked.model)
    hub = parse_model(asked.model, None)
    if not isinstance(hub, Path) and (copy := fetch_conversion(hub)) is not None:
        path = copy
    # A merged model that is still quantized has a manifest too, but no start and no plain quantization to compare with.
    if (path / RECORD).is_file() or not _is_conversion(path):
        with _opened_plain(asked) as subjects:
            yield subjects
    else:
        with _opened_conversion(asked, path, read_manifest(path)) as subjects:
            yield subjects


def _is_conversion(path: Path) -> bool:
    """True for a finished conversion, and for an unfinished one, which `read_manifest` refuses."""
    return (path / NAME).exists() or ((path / ".loftq").is_dir() and not (path / "config.json").exists())


@contextmanager
def _opened_conversion(asked: Request, path: Path, manifest: Manifest) -> Iterator[Subjects]:
    with opened_source(manifest, asked.source) as checkpoint:
        model = open_model(checkpoint, asked.device)
        weights: dict[str, Weights] = {
            "source": SourceWeights(checkpoint),
            "plain": PlainWeights(checkpoint, path, manifest),
            "backbone": BackboneWeights(path, manifest),
            "start": BackboneWeights(path, manifest, adapter=True),
        }
        if asked.adapter is not None:
            weights["trained"] = _trained_weights(asked, path, manifest)
        models = {name: Subject(model, one) for name, one in weights.items()}
        yield Subjects(models, open_tokenizer(path), asked.source or manifest.source)


@dataclass(frozen=True)
class _TrainedWeights(BackboneWeights):
    """The backbone with a trained adapter instead of the starting one.

    Attributes:
        trained, places: the adapter, and where it keeps the factors of each module.
        saved: tensor → what the adapter replaces it with.
    """

    trained: TrainedAdapter | None = None
    places: Mapping[str, Place] | None = None
    saved: Mapping[str, SavedTensor] | None = None

    def _one(self, record: MatrixRecord | KeptRecord) -> torch.Tensor:
        assert self.trained is not None and self.places is not None and self.saved is not None
        weight = super()._one(record)
        saved = self.saved.get(record.tensor)
        if saved is not None:
            weight = saved.apply(self.trained, weight)
        name = name_of_expert(record) if record.expert is not None else record.module
        place = self.places.get(name or "")
        if place is None:
            return weight
        n_in = (record.matrix_shape if isinstance(record, KeptRecord) else record.shape)[1]
        return weight.float() + record.orientation.turn(self.trained.update(place, n_in))


def _trained_weights(asked: Request, path: Path, manifest: Manifest) -> Weights:
    """Return the backbone with the trained adapter.

    Raises:
        LoftqError: the adapter does not belong to it, or changes the shape of a tensor.
    """
    assert asked.adapter is not None
    trained = read_adapter(asked.adapter)
    if note := check_trained_on(conversion_in(path), trained.folder, force=asked.force):
        asked.noted(f"{note}.")
    saved = {}
    if trained.wholes or trained.rows:
        with closing(open_safetensors(path)) as checkpoint:
            saved = find_saved(trained, manifest, checkpoint.tensors, checkpoint.read)
    reshaped = next((one.tensor for one in saved.values() if one.shape != one.before), None)
    if reshaped is not None:
        raise LoftqError(
            f"the adapter in {trained.folder} has a {reshaped} of another shape than the backbone, so it cannot be "
            "compared with the source: merge it with `loftq merge` and evaluate the result."
        )
    return _TrainedWeights(path, manifest, False, trained, find_places(trained, manifest), saved)


@contextmanager
def _opened_plain(asked: Request) -> Iterator[Subjects]:
    """Open a model that is no conversion, and the source to compare it with if the user names one."""
    with ExitStack() as stack:
        opened = _open_model(asked.model, asked, stack)
        models = {"model": opened.subject}
        if asked.source is not None:
            alone = replace(asked, adapter=None)
            models = {"source": _open_model(asked.source, alone, stack).subject, **models}
        yield Subjects(models, opened.tokenizer, asked.source)


@dataclass(frozen=True)
class _Opened:
    subject: Subject
    tokenizer: PreTrainedTokenizerBase


def _open_model(name: str, asked: Request, stack: ExitStack) -> _Opened:
    """Open any model: block by block where loftq reads its weights, else whole as transformers loads it.

    Raises:
        LoftqError: neither is possible.
    """
    place = parse_model(name, None)
    checkpoint, reason = None, None
    try:
        checkpoint, _ = stack.enter_context(open_source(Recipe(name)))
    except UsageError:
        raise
    except LoftqError as error:
        if not isinstance(place, Path) or not (place / "config.json").is_file():
            raise
        reason = error
    if checkpoint is not None and asked.adapter is None and quantization_method(checkpoint) is None:
        subject = Subject(open_model(checkpoint, asked.device), SourceWeights(checkpoint))
        return _Opened(subject, source_tokenizer(checkpoint))
    folder = place if isinstance(place, Path) else checkpoint.path if checkpoint is not None else Path(name)
    model = hold_model(_loaded(folder, name, asked, reason), asked.device)
    return _Opened(Subject(model, LoadedWeights()), open_tokenizer(folder, named=name))


def _loaded(folder: Path, name: str, asked: Request, reason: LoftqError | None) -> PreTrainedModel:
    """Load a model whole, in float32 or in whatever its quantization computes in, with its adapter if there is one.

    Args:
        reason: why loftq cannot read its weights, if that is so.

    Raises:
        LoftqError: transformers cannot load it, or the adapter does not belong to it.
    """
    from loftq_cli.runtime.load import load

    options: dict[str, Any] = {"dtype": torch.float32, "force": asked.force}
    if asked.device.type != "cpu":
        options["device_map"] = {"": str(asked.device)}
    try:
        model: Any = load(folder, adapter=asked.adapter or False, **options)
    except LoftqError:
        raise
    except Exception as error:  # transformers and the quantizers raise many kinds
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise reason or LoftqError(f"transformers cannot load {name} ({cause}): check the model.") from error
    return model if asked.adapter is None else model.get_base_model()
