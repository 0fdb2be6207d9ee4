"""A model's repeated blocks: found by structure, run on a few windows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PIECE_TOKENS = (
    2048  # run through a block at once; its inner activations take several times the memory of the hidden states
)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of every outermost `nn.ModuleList` that have parameters, by path: a decoder's layers, or both
    stacks of an encoder-decoder. Module names do not matter."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    blocks = {
        f"{path}.{name}": block for path in outermost for name, block in model.get_submodule(path).named_children()
    }
    return {path: block for path, block in blocks.items() if any(True for _ in block.parameters())}


def run_in_pieces(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], rows: int, piece: int
) -> Any:
    """Call `forward` on `piece` of `rows` windows at a time and concatenate the outputs.

    Tensors of at least two dimensions, the first of size `rows`, are split; every call receives all other arguments
    whole.
    """
    if rows <= piece:
        return forward(*args, **kwargs)
    outputs = []
    for start in range(0, rows, piece):
        cut = slice(start, start + piece)
        outputs.append(
            forward(*[take(arg, cut, rows) for arg in args], **{k: take(v, cut, rows) for k, v in kwargs.items()})
        )
    return _join(outputs, piece)


def take(value: Any, rows: slice, count: int) -> Any:
    """Select the windows `rows` of `count` from a tensor, or from a tuple, list or dictionary of tensors."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(take(item, rows, count) for item in value)
    if isinstance(value, dict):
        return {key: take(item, rows, count) for key, item in value.items()}
    return value


def windows_per_piece(rows: int, tokens_per_row: int) -> int:
    """Return how many windows to run through a block at once. Never one of several, so that tensors that all windows
    share, such as relative positions, can be told from tensors with one entry per window."""
    return min(rows, max(2, PIECE_TOKENS // max(1, tokens_per_row)))


def _join(outputs: list[Any], piece: int) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs) if first.ndim and first.shape[0] == piece else first
    if isinstance(first, (tuple, list)):
        return type(first)(_join([output[i] for output in outputs], piece) for i in range(len(first)))
    return first
