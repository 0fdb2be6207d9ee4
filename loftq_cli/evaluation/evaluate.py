"""`loftq_cli.evaluate`: measure the loss of a model on a text; of a conversion, also what its adapter recovers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.evaluation.scores import Evaluation, Tally, scores_of, verdict
from loftq_cli.evaluation.subjects import Request, Subject, Subjects, opened_subjects
from loftq_cli.forward.losses import summed_divergence, summed_loss
from loftq_cli.forward.objectives import Objective, choose_objective
from loftq_cli.forward.streamed import Outputs, StreamedModel
from loftq_cli.forward.text import Text, Windows, make_windows, position_limit, read_text
from loftq_cli.machine.confined import user_path
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.usage import peak_memory

logger = logging.getLogger(__name__)


class EvalReporter:
    """Receives progress events and ignores them; subclasses show them."""

    def start(self, work: int) -> None:
        """Called first, with the number of calls of `advance` to come."""

    def advance(self, model: str) -> None:
        """Called when one group of windows has run through one model."""

    def close(self) -> None:
        """Called last."""


@full_precision()
def evaluate(
    directory: str | Path,
    text: str | Path,
    *,
    adapter: str | Path | None = None,
    source: str | Path | None = None,
    max_tokens: int | None = None,
    window: int | None = None,
    device: str = "auto",
    force: bool = False,
    reporter: EvalReporter | None = None,
    noted: Callable[[str], None] = logger.warning,
) -> Evaluation:
    """Measure the loss on a text of a conversion and its source, or of any other model.

    Of a conversion: the source, its plain quantization, the backbone alone, with its starting adapter, and with
    `adapter` if one is given. Any other model, merged or not converted at all, is measured by itself, and compared with
    `source` if that is given. All are computed in float32, one after the other, each with one block's weights in memory
    at a time; models whose weights loftq cannot read, and adapters on them, are held whole as transformers loads them.
    Nothing is written.

    Decoders get the perplexity of next tokens in windows that do not overlap; models with a masked-language head the
    loss on 15 % masked tokens, the same for all; encoder-decoders the loss on the second half of every window given the
    first; other encoders the error of their hidden states. Models with a language head also get the mean KL divergence
    of their predictions from the source's.

    Args:
        directory: output of `quantize` or `merge`, any model that transformers loads, or `org/name` on the Hub.
        text: .txt, .jsonl, .json or .parquet, or a directory of them.
        adapter: a folder that PEFT's `save_pretrained` wrote after training.
        source: the model to compare with; by default the one that a conversion was made from.
        max_tokens: how many tokens of the text to use; None uses all.
        window: tokens per window; by default the model's maximum, at most 2048.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        force: use an adapter that was trained on another conversion.
        noted: called with a note about the adapter; logged as a warning by default.

    Raises:
        UsageError: an argument is invalid.
        LoftqError: directory, source, adapter or text cannot be read, the adapter was trained on another conversion, or
            the model does not run on text.
    """
    from loftq_cli.machine.devices import choose_device

    for flag, value in (("--max-tokens", max_tokens), ("--window", window)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} cannot be {value}: give a whole number of at least 1.")
    started, chosen = time.perf_counter(), choose_device(device)
    place = None if adapter is None else user_path(adapter)
    asked = Request(str(directory), None if source is None else str(source), place, force, chosen, noted)
    read = read_text(text, "--text")
    with opened_subjects(asked) as subjects:
        windows = _windows(read, subjects, max_tokens, window)
        model = subjects.last.model
        objective = choose_objective(model.model, subjects.tokenizer, windows)
        _check_comparable(subjects, objective, windows)
        if objective.labels is None and "source" not in subjects.models:
            raise LoftqError(
                f"{type(model.model).__name__} has no language head, so only its error against another model can be "
                "measured: give that model with --source."
            )
        tallies = _measure(subjects.models, objective, reporter or EvalReporter())
    scores = scores_of(tallies, objective.metric)
    said = verdict(scores)
    return Evaluation(
        directory=str(user_path(directory)),
        source=subjects.source,
        adapter=None if place is None else str(place),
        text=str(text),
        text_sha256=read.sha256,
        metric=objective.metric,
        tokens=objective.scored,
        windows=len(windows.ids),
        window=windows.length,
        device=str(chosen),
        blocks=len(model.blocks),
        scores=scores,
        notes=() if said is None else (said,),
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(chosen) if chosen.type == "cuda" else 0,
    )


def _check_comparable(subjects: Subjects, objective: Objective, windows: Windows) -> None:
    """Raise if one of the models does not predict what the others do."""
    for name, subject in subjects.models.items():
        model = subject.model.model
        if choose_objective(model, subjects.tokenizer, windows).metric != objective.metric:
            raise LoftqError(
                f"{subjects.source if name == 'source' else name} is a {type(model).__name__}, which has no "
                f"{objective.metric}, so they cannot be compared: give the model it was made from, or leave --source "
                "out."
            )


def _windows(text: Text, subjects: Subjects, max_tokens: int | None, window: int | None) -> Windows:
    """Return windows that all of the models can take."""
    limits = [position_limit(subject.model.model.config) for subject in subjects.models.values()]
    known = [limit for limit in limits if limit is not None]
    return make_windows(
        text, subjects.tokenizer, positions=min(known, default=None), max_tokens=max_tokens, window=window
    )


@dataclass(frozen=True)
class _Reference:
    """The outputs of the source for the current group: what the other models are compared with."""

    model: StreamedModel
    outputs: Outputs | None = None
    hidden: Tensor | None = None


def _measure(models: Mapping[str, Subject], objective: Objective, reporter: EvalReporter) -> dict[str, Tally]:
    """Run all models on every group of windows; only one has its weights in memory at a time."""
    tallies = {name: Tally() for name in models}
    windows, tokens = objective.batch["input_ids"].shape
    size = min(subject.model.group(windows, tokens) for subject in models.values())
    starts = range(0, windows, size)
    reporter.start(len(starts) * len(models))
    try:
        for start in starts:
            group, reference = objective.rows(slice(start, start + size)), None
            for name, subject in models.items():
                began = time.perf_counter()
                found = _run(subject, group, reference, tallies[name])
                reference = found if name == "source" else reference
                tallies[name].seconds += time.perf_counter() - began
                reporter.advance(name)
    finally:
        reporter.close()
    return tallies


def _run(subject: Subject, group: Objective, reference: _Reference | None, tally: Tally) -> _Reference:
    """Add one model's sums over a group of windows, and return its outputs."""
    model, batch = subject.model, group.batch
    kept = reference.outputs if reference is not None and reference.model is model else None
    model.load(subject.weights, kept.head if kept else {})
    if group.labels is None:
        hidden = model.features(batch)
        against = hidden if reference is None or reference.hidden is None else reference.hidden
        if hidden.shape != against.shape:
            raise _incomparable("hidden states", hidden.shape[-1], against.shape[-1])
        tally.total += _energy(hidden - against)
        tally.count += _energy(against)
        return _Reference(model, hidden=hidden)
    outputs, labels = model.outputs(batch), group.labels.reshape(-1)
    for cut in model.pieces(outputs):
        logits = model.logits_at(outputs, cut)
        tally.total += summed_loss(logits, labels[cut])
        if reference is not None and reference.outputs is not None:
            expected = reference.model.logits_at(reference.outputs, cut)
            if expected.shape != logits.shape:
                raise _incomparable("a vocabulary", logits.shape[-1], expected.shape[-1])
            tally.divergence += summed_divergence(expected, logits, labels[cut])
    tally.count += group.scored
    return _Reference(model, outputs)


def _incomparable(what: str, ours: int, theirs: int) -> LoftqError:
    return LoftqError(
        f"the model has {what} of {ours} and --source of {theirs}, so they cannot be compared: give the model it was "
        "made from, or leave --source out."
    )


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
