"""A transformers model that holds the weights of one block at a time.

The class is built without weights. Its repeated blocks are told to fetch their own weights when they are called, to run
all windows in small pieces, and to let go: what stays in memory is the embeddings, the head, one block and the hidden
states of a group of windows. The model's own forward does the rest, so masks, positions and cross-attention are its
own. `forward.opening.open_model` finds out whether a model can be run so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loftq_cli.forward.blocks import PIECE_TOKENS, piece_of, run_in_pieces
from loftq_cli.forward.parameters import Parameters
from loftq_cli.forward.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]  # input_ids [windows, tokens], and decoder_input_ids for an encoder-decoder

IGNORED = -100  # label of a position that is not scored
_HIDDEN_BYTES = 256 << 20  # hidden states of one group of windows
_LOGIT_BYTES = 128 << 20


class StreamedModel:
    """A model run with the weights that `load` was given last.

    Attributes:
        model: the transformers model; its parameters come and go.
        blocks: the modules that hold their weights only while they run, by path; none where the model is held whole.
        splits: the output layers can run apart from the base model, on a few positions at a time.
        piece: windows that go through a block at once; None follows from their length.
        on_block_done: called with the path of a block after all windows of a call went through it.
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
        self._there: frozenset[str] = frozenset()
        self._shape = (1, 1)
        self._inside: set[str] = set()
        for path, block in blocks.items():
            names = parameters.within(path)
            self._inside.update(names)
            block.forward = functools.partial(self._run_block, path, names, block.forward)

    def load(self, weights: Weights) -> None:
        """Take all weights from here on from `weights`; what lies outside the blocks is read now."""
        self._weights, self._there = weights, frozenset(weights.names)
        self.parameters.fill([name for name in self._known(self.parameters.keys) if name not in self._inside], weights)

    def group(self, windows: int, tokens: int) -> int:
        """How many of `windows` windows of `tokens` tokens one call may take."""
        if not self.blocks:
            return max(1, min(windows, PIECE_TOKENS // tokens))
        rows = _HIDDEN_BYTES // (4 * self._width * tokens)
        if not self.splits:
            rows = min(rows, _LOGIT_BYTES // (4 * self._vocabulary * tokens))
        rows = max(1, min(windows, rows))
        return rows - 1 if rows == tokens > 1 else rows  # windows and positions are told apart by their number

    def features(self, batch: Batch) -> Tensor:
        """The last hidden states [windows, tokens, width], without any head."""
        return self._call(self.model.base_model, batch).last_hidden_state

    def run(self, batch: Batch, *, head: bool) -> None:
        """Run and keep nothing, for what hooks see. `head`: whether the output layers must run too."""
        if not self.splits:
            self._call(self.model, batch)
        elif head:
            for _ in self.logits(batch):
                pass
        else:
            self._call(self.model.base_model, batch)

    def loss(self, batch: Batch, labels: Tensor) -> float:
        """Summed negative log-likelihood in nats of `labels` [windows, tokens]: what each position is to predict,
        IGNORED where nothing is scored."""
        total, flat = 0.0, labels.reshape(-1)
        for positions, logits in self.logits(batch):
            wanted = flat[positions].to(self.device)
            losses = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="none")
            total += float(losses.sum(dtype=torch.float64))
        return total

    def logits(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """Logits [positions, vocabulary] piece by piece; the slices run over windows × tokens, flattened."""
        if not self.splits:
            found = self._call(self.model, batch).logits
            yield slice(0, found.shape[0] * found.shape[1]), found.flatten(0, 1)
            return
        trunk = self._call(self.model.base_model, batch)
        hidden = trunk.last_hidden_state
        count = hidden.shape[0] * hidden.shape[1]
        step = max(1, _LOGIT_BYTES // (4 * self._vocabulary))
        flat = {name: ids.reshape(1, -1) for name, ids in batch.items() if ids.numel() == count}
        for start in range(0, count, step):
            cut = slice(start, min(start + step, count))
            with self._trunk_gives(type(trunk)(last_hidden_state=hidden.reshape(1, count, -1)[:, cut])):
                output = self._call(self.model, {name: ids[:, cut] for name, ids in flat.items()})
            yield cut, output.logits[0]

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
    def _trunk_gives(self, output: Any) -> Iterator[None]:
        """Within, the base model gives `output` whatever it is asked."""
        base, asked = self.model.base_model, []
        own = base.forward

        def given(*args: Any, **kwargs: Any) -> Any:
            asked.append(True)
            return output

        base.forward = given
        try:
            yield
        finally:
            base.forward = own
        assert asked, "the head does not call its base model"

    def _run_block(self, path: str, own: Sequence[str], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self._weights is not None, "load comes first"
        names, (rows, tokens) = self._known(own), self._shape
        self.parameters.fill(names, self._weights)
        try:
            return run_in_pieces(forward, args, kwargs, rows, self.piece or piece_of(rows, tokens))
        finally:
            self.parameters.clear(names)
            self.on_block_done(path)

    def _known(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._there]
