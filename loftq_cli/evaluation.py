"""`loftq_cli.evaluate`: measure the loss from quantization on a text, and how much of it the adapter recovers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import read_manifest
from loftq_cli.artifacts.origin import opened_source
from loftq_cli.errors import UsageError
from loftq_cli.forward.objectives import Objective, choose_objective
from loftq_cli.forward.opening import open_model
from loftq_cli.forward.streamed import StreamedModel
from loftq_cli.forward.text import make_windows, open_tokenizer, position_limit, read_text
from loftq_cli.forward.weights import BackboneWeights, PlainWeights, SourceWeights, Weights
from loftq_cli.machine.confined import user_path
from loftq_cli.machine.precision import full_precision
from loftq_cli.machine.usage import peak_memory

_OVERFLOW = 700.0  # the largest loss, in nats, whose perplexity fits a float

MODELS = {
    "source": "the full-precision model",
    "plain": "plain quantization, no adapter",
    "backbone": "the backbone without its adapter",
    "start": "the backbone with its adapter",
}


@dataclass(frozen=True)
class Score:
    """The score of one model on the text.

    Attributes:
        model: a key of `MODELS`.
        loss: mean negative log-likelihood in nats per scored token; for a model without a language head the relative
            error ‖h − h_source‖ / ‖h_source‖ of its last hidden states.
        perplexity: exp(loss); None without a language head.
        gap: (loss − loss of the source) / (loss of plain − loss of the source): 1 for plain quantization, 0 for the
            source; None for these two, and if plain quantization costs nothing.
        seconds: of its passes.
    """

    model: str
    loss: float
    perplexity: float | None
    gap: float | None
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The result of `loftq eval`.

    Attributes:
        metric: `perplexity`, `masked loss`, `sequence loss` or `representation error`.
        tokens: scored tokens; each window has `window` tokens.
        blocks: the number of blocks, of which one was in memory at a time; 0 if the whole model was in memory.
        peak_memory_bytes: of the whole process.
    """

    directory: str
    source: str
    text: str
    text_sha256: str
    metric: str
    tokens: int
    windows: int
    window: int
    device: str
    blocks: int
    scores: tuple[Score, ...]
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int

    def score(self, model: str) -> Score:
        """Return the score of one model."""
        return next(score for score in self.scores if score.model == model)


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
    source: str | Path | None = None,
    max_tokens: int | None = None,
    window: int | None = None,
    device: str = "auto",
    reporter: EvalReporter | None = None,
) -> Evaluation:
    """Measure the loss on a text for the source, its plain quantization, the backbone alone and with its adapter.

    All four are computed in float32, one after the other, each with one block's weights in memory at a time; nothing is
    written. Decoders get the perplexity of next tokens in windows that do not overlap; models with a masked-language
    head the loss on 15 % masked tokens, the same for all; encoder-decoders the loss on the second half of every window
    given the first; other encoders the error of their hidden states.

    Args:
        directory: output of `quantize`.
        text: .txt, .jsonl, .json or .parquet, or a directory of them.
        source: the model it was made from; by default the one named in the manifest.
        max_tokens: how many tokens of the text to use; None uses all.
        window: tokens per window; by default the model's maximum, at most 2048.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.

    Raises:
        UsageError: an argument is invalid.
        LoftqError: directory, source or text cannot be read, or the model does not run on text.
    """
    from loftq_cli.machine.devices import choose_device

    for flag, value in (("--max-tokens", max_tokens), ("--window", window)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} cannot be {value}: give a whole number of at least 1.")
    path, started, chosen = user_path(directory), time.perf_counter(), choose_device(device)
    manifest, read = read_manifest(path), read_text(text, "--text")
    with opened_source(manifest, source) as checkpoint:
        model = open_model(checkpoint, chosen)
        windows = make_windows(
            read,
            tokenizer := open_tokenizer(path),
            positions=position_limit(model.model.config),
            max_tokens=max_tokens,
            window=window,
        )
        objective = choose_objective(model.model, tokenizer, windows)
        variants: dict[str, Weights] = {
            "source": SourceWeights(checkpoint),
            "plain": PlainWeights(checkpoint, path, manifest),
            "backbone": BackboneWeights(path, manifest),
            "start": BackboneWeights(path, manifest, adapter=True),
        }
        tallies = _measure(model, variants, objective, reporter or EvalReporter())
    return Evaluation(
        directory=str(path),
        source=str(source or manifest.source),
        text=str(text),
        text_sha256=read.sha256,
        metric=objective.metric,
        tokens=objective.scored,
        windows=len(windows.ids),
        window=windows.length,
        device=str(chosen),
        blocks=len(model.blocks),
        scores=_scores(tallies, objective.metric),
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(chosen) if chosen.type == "cuda" else 0,
    )


@dataclass
class _Tally:
    """The sums of one model: nats and tokens, or ‖h − h_source‖² and ‖h_source‖² of hidden states."""

    total: float = 0.0
    count: float = 0.0
    seconds: float = 0.0


def _measure(
    model: StreamedModel, variants: Mapping[str, Weights], objective: Objective, reporter: EvalReporter
) -> dict[str, _Tally]:
    """Run all variants on every group of windows; only one variant has its weights in memory at a time."""
    tallies = {name: _Tally() for name in variants}
    windows, tokens = objective.batch["input_ids"].shape
    size = model.group(windows, tokens)
    starts = range(0, windows, size)
    reporter.start(len(starts) * len(variants))
    try:
        for start in starts:
            group, reference = objective.rows(slice(start, start + size)), None
            for name, weights in variants.items():
                tally, began = tallies[name], time.perf_counter()
                model.load(weights)
                if group.labels is not None:
                    tally.total += model.loss(group.batch, group.labels)
                    tally.count += group.scored
                else:
                    hidden = model.features(group.batch)
                    reference = hidden if reference is None else reference
                    tally.total += _energy(hidden - reference)
                    tally.count += _energy(reference)
                tally.seconds += time.perf_counter() - began
                reporter.advance(name)
    finally:
        reporter.close()
    return tallies


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _scores(tallies: Mapping[str, _Tally], metric: str) -> tuple[Score, ...]:
    relative = metric == "representation error"
    losses = {name: sqrt(t.total / t.count) if relative else t.total / t.count for name, t in tallies.items()}
    damage = losses["plain"] - losses["source"]
    scores = []
    for name, loss in losses.items():
        perplexity = None if relative else exp(min(loss, _OVERFLOW))
        gap = (loss - losses["source"]) / damage if name in ("backbone", "start") and damage > 0 else None
        scores.append(Score(name, loss, perplexity, gap, round(tallies[name].seconds, 3)))
    return tuple(scores)
