"""A transformers model that holds the weights of one block at a time.

The class is built without weights. When a repeated block is called, it loads its weights, runs all windows in small
pieces, and frees the weights again. Only the embeddings, the head, one block and the hidden states of a group of
windows stay in memory. The rest is the model's own forward method, which computes masks, positions and
cross-attention. `forward.opening.open_model` finds out if a model can be run this way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq_cli.forward.blocks import PIECE_TOKENS, run_in_pieces, windows_per_piece
from loftq_cli.forward.losses import summed_loss
from loftq_cli.forward.parameters import Parameters
from loftq_cli.forward.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]  # input_ids [windows, tokens], and decoder_input_ids for an encoder-decoder

_HIDDEN_BYTES = 256 << 20  # hidden states of one group of windows
_LOGIT_BYTES = 128 << 20


@dataclass(frozen=True)
class Outputs:
    """A batch's outputs, kept so that its logits can be computed again, a few positions at a time.

    Attributes:
        base: the base model's output with hidden states [windows, tokens, width], if the output layers run separately.
        head: the tensors of the output layers by their names on disk.
        logits: [windows * tokens, vocabulary], if the output layers do not run separately.
    """

    batch: Batch
    positions: int
    base: Any = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


class StreamedModel:
    """A model that runs with the weights of the last call to `load`.

    Attributes:
        model: the transformers model; its parameters are set and cleared.
        blocks: the modules that hold their weights only while they run, by path; empty if the model is held whole.
        splits: the output layers can run separately from the base model, on a few positions at a time.
        piece: windows run through a block at once; None derives it from their length.
        on_block_done: called with the path of a block after all windows of a call have passed through it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Parameters,
        blocks: Mapping[str, nn.Module],
        device: torch.device,
        *,
        splits: bool,
        piece: int | None = None,
    ) -> None:
        self.model, self.parameters, self.blocks, self.device = model, parameters, blocks, device
        self.splits, self.piece = splits, piece
        self.on_block_done: Callable[[str], None] = lambda path: None
        self._weights: Weights | None = None
        self._available: frozenset[str] = frozenset()
        self._shape = (1, 1)
        self._inside: set[str] = set()
        for path, block in blocks.items():
            names = parameters.within(path)
            self._inside.update(names)
            block.forward = functools.partial(self._run_block, path, names, block.forward)

    def load(self, weights: Weights, shared: Mapping[str, Tensor] | None = None) -> None:
        """Use `weights` from now on; tensors outside the blocks are read at once.

        Args:
            shared: tensors by name that stay in memory anyway, which are used in place of equal ones of `weights`.
        """
        self._weights, self._available = weights, frozenset(weights.names)
        outside = [name for name in self._known(self.parameters.keys) if name not in self._inside]
        self.parameters.fill(outside, weights, shared or {})

    def group(self, windows: int, tokens: int) -> int:
        """Return how many of `windows` windows of `tokens` tokens to run in one call."""
        if not self.blocks:
            return max(1, min(windows, PIECE_TOKENS // tokens))
        rows = _HIDDEN_BYTES // (4 * self._width * tokens)
        if not self.splits:
            rows = min(rows, _LOGIT_BYTES // (4 * self._vocabulary * tokens))
        rows = max(1, min(windows, rows))
        return rows - 1 if rows == tokens > 1 else rows  # the numbers of windows and positions must differ

    def features(self, batch: Batch) -> Tensor:
        """Return the last hidden states [windows, tokens, width], without a head."""
        return self._call(self.model.base_model, batch).last_hidden_state

    def run(self, batch: Batch, *, head: bool) -> None:
        """Run the model for its hooks and discard the output. With `head`, the output layers run too."""
        if not self.splits:
            self._call(self.model, batch)
        elif head:
            for _ in self.logits(batch):
                pass
        else:
            self._call(self.model.base_model, batch)

    def loss(self, batch: Batch, labels: Tensor) -> float:
        """Return the summed negative log-likelihood in nats of `labels` [windows, tokens]: the token that each position
        is to predict, or IGNORED."""
        flat = labels.reshape(-1)
        return sum(summed_loss(logits, flat[positions]) for positions, logits in self.logits(batch))

    def logits(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """Yield logits [positions, vocabulary] piece by piece, with their slice of the flattened windows × tokens."""
        outputs = self.outputs(batch)
        for cut in self.pieces(outputs):
            yield cut, self.logits_at(outputs, cut)

    def outputs(self, batch: Batch) -> Outputs:
        """Run a batch with the loaded weights, up to the output layers if they run separately."""
        if not self.splits:
            logits = self._call(self.model, batch).logits
            return Outputs(batch, logits.shape[0] * logits.shape[1], logits=logits.flatten(0, 1))
        base = self._call(self.model.base_model, batch)
        rows, tokens = base.last_hidden_state.shape[:2]
        return Outputs(batch, rows * tokens, base, self.parameters.outside(self.model.base_model_prefix))

    def pieces(self, outputs: Outputs) -> Iterator[slice]:
        """Yield slices of the flattened windows × tokens, whose logits are to be in memory together."""
        step = max(1, _LOGIT_BYTES // (4 * self._vocabulary)) if self.splits else outputs.positions
        for start in range(0, outputs.positions, step):
            yield slice(start, min(start + step, outputs.positions))

    def logits_at(self, outputs: Outputs, cut: slice) -> Tensor:
        """Return logits [positions, vocabulary] of a slice, computed by the output layers that `outputs` remembers,
        whatever weights have been loaded since."""
        if outputs.logits is not None:
            return outputs.logits[cut]
        self.parameters.put(outputs.head)
        count, hidden = outputs.positions, outputs.base.last_hidden_state
        flat = {name: ids.reshape(1, -1) for name, ids in outputs.batch.items() if ids.numel() == count}
        piece = type(outputs.base)(last_hidden_state=hidden.reshape(1, count, -1)[:, cut])
        with self._base_returns(piece):
            found: Tensor = self._call(self.model, {name: ids[:, cut] for name, ids in flat.items()}).logits[0]
        return found

    @property
    def _width(self) -> int:
        config: Any = self.model.config.get_text_config(decoder=True)
        size: int | None = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        return size or 1024

    @property
    def _vocabulary(self) -> int:
        config: Any = self.model.config.get_text_config(decoder=True)
        size: int | None = getattr(config, "vocab_size", None)
        return size or 32_000

    def _call(self, module: nn.Module, batch: Batch) -> Any:
        rows, tokens = next(iter(batch.values())).shape
        self._shape = (rows, tokens)
        with torch.no_grad():
            return module(**{name: ids.to(self.device) for name, ids in batch.items()}, return_dict=True)

    @contextmanager
    def _base_returns(self, output: Any) -> Iterator[None]:
        """Within this context the base model returns `output` for any input."""
        base, calls = self.model.base_model, []
        original = base.forward

        def fixed(*args: Any, **kwargs: Any) -> Any:
            calls.append(True)
            return output

        base.forward = fixed
        try:
            yield
        finally:
            base.forward = original
        assert calls, "the head does not call its base model"

    def _run_block(self, path: str, own: Sequence[str], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self._weights is not None, "call load first"
        names, (rows, tokens) = self._known(own), self._shape
        self.parameters.fill(names, self._weights)
        try:
            return run_in_pieces(forward, args, kwargs, rows, self.piece or windows_per_piece(rows, tokens))
        finally:
            self.parameters.clear(names)
            self.on_block_done(path)

    def _known(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._available]
