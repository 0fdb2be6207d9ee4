"""The numbers that `loftq eval` reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, sqrt

_OVERFLOW = 700.0  # the largest loss, in nats, whose perplexity fits a float
_NOISE = 1e-6  # relative difference of two measures that float32 sums may leave

MODELS = {
    "source": "the full-precision model",
    "plain": "plain quantization, no adapter",
    "backbone": "the backbone without its adapter",
    "start": "the backbone with its adapter",
    "trained": "the backbone with the trained adapter",
    "model": "the model itself",
}
_COMPARED = ("backbone", "start", "trained")  # by the share of plain quantization's loss that they keep


@dataclass(frozen=True)
class Score:
    """The score of one model on the text.

    Attributes:
        model: a key of `MODELS`.
        loss: mean negative log-likelihood in nats per scored token; for a model without a language head the relative
            error ‖h − h_source‖ / ‖h_source‖ of its last hidden states.
        perplexity: exp(loss); None without a language head.
        kl: mean Kullback-Leibler divergence KL(source ‖ model) of the predictions, in nats per scored token; 0 for the
            source; None without a source or without a language head.
        gap: (loss − loss of the source) / (loss of plain − loss of the source): 1 for plain quantization, 0 for the
            source; None for these two, and if plain quantization costs nothing.
        seconds: of its passes.
    """

    model: str
    loss: float
    perplexity: float | None
    kl: float | None
    gap: float | None
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The result of `loftq eval`.

    Attributes:
        source: the full-precision model; None if there is nothing to compare with.
        adapter: the trained adapter, or None.
        metric: `perplexity`, `masked loss`, `sequence loss` or `representation error`.
        tokens: scored tokens; each window has `window` tokens.
        blocks: the number of blocks, of which one was in memory at a time; 0 if the whole model was in memory.
        notes: sentences about the result, such as that a start is worse than plain quantization.
        peak_memory_bytes: of the whole process.
    """

    directory: str
    source: str | None
    adapter: str | None
    text: str
    text_sha256: str
    metric: str
    tokens: int
    windows: int
    window: int
    device: str
    blocks: int
    scores: tuple[Score, ...]
    notes: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int

    def score(self, model: str) -> Score:
        """Return the score of one model."""
        return next(score for score in self.scores if score.model == model)


@dataclass
class Tally:
    """The sums of one model: nats, tokens and divergence, or ‖h − h_source‖² and ‖h_source‖² of hidden states."""

    total: float = 0.0
    count: float = 0.0
    divergence: float = 0.0
    seconds: float = 0.0


def scores_of(tallies: Mapping[str, Tally], metric: str) -> tuple[Score, ...]:
    """Return the score of every model from its sums."""
    relative = metric == "representation error"
    losses = {name: sqrt(t.total / t.count) if relative else t.total / t.count for name, t in tallies.items()}
    source, plain = losses.get("source"), losses.get("plain")
    scores = []
    for name, loss in losses.items():
        tally, gap = tallies[name], None
        if name in _COMPARED and source is not None and plain is not None and plain > source:
            gap = (loss - source) / (plain - source)
        # A sum of rounded terms can come out below zero, which no divergence is.
        kl = None if relative or source is None else max(0.0, tally.divergence / tally.count)
        perplexity = None if relative else exp(min(loss, _OVERFLOW))
        scores.append(Score(name, loss, perplexity, kl, gap, round(tally.seconds, 3)))
    return tuple(scores)


def verdict(scores: tuple[Score, ...]) -> str | None:
    """Return a sentence if the start is worse than plain quantization by any measure, or None."""
    known = {score.model: score for score in scores}
    if "start" not in known or "plain" not in known:
        return None
    start, plain = known["start"], known["plain"]
    pairs = [("KL", start.kl, plain.kl, " nats a token"), ("perplexity", start.perplexity, plain.perplexity, "")]
    if start.perplexity is None:
        pairs = [("error", start.loss, plain.loss, "")]
    worse = [
        f"{name} ({_against(ours, theirs)}{unit})"
        for name, ours, theirs, unit in pairs
        if ours is not None and theirs is not None and ours > theirs * (1 + _NOISE)
    ]
    if not worse:
        return None
    return (
        f"on this text the start is worse than plain quantization by {' and '.join(worse)}: `--calibrate` may help, "
        "and `--method qlora` starts at plain quantization."
    )


def _against(ours: float, theirs: float) -> str:
    """Return two different numbers with as many digits as show that they differ."""
    digits = next((n for n in range(3, 9) if f"{ours:.{n}g}" != f"{theirs:.{n}g}"), 9)
    return f"{ours:.{digits}g} against {theirs:.{digits}g}"
