"""The best codes for cyclic sequences of a trellis, by the Viterbi algorithm; the plain-torch twin.

A code sequence is a path through states. Entering state s at weight x costs gain · (x - table[s])². State s follows
the 2**bits states whose lower bits are s >> bits (`numerics.grids.trellis`), so one step is, with K = 2**bits and
S = 2**state_bits / K,

    least[p] = min over h < K of cost[h · S + p],    cost'[s] = least[s >> bits] + gain · (x - table[s])².

The lowest bits of the float32 costs are replaced by h, so that the minimum of the costs, compared as integers, also
tells which h it comes from; that loses up to 2⁻²⁰ of a cost.

In a cyclic sequence the state before the first weight must be the last one. It is found by a first pass over the
weights on both sides of that place, free at both ends (as in QTIP, section 3.2); the second pass starts and ends there.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.numerics.grids.trellis import states

AROUND = 32  # weights on each side of a sequence's ends that determine the state there
FORBIDDEN = 1e30  # cost of a start that is not allowed

_AT_ONCE = 1 << 24  # costs and choices in memory
_FEW_BITS = 12  # of whole sequences that are all tried, because a first pass finds poor ends for them


class Encode(Protocol):
    """A function that finds the codes of sequences."""

    def __call__(self, x: Tensor, gain: Tensor, table: Tensor, bits: int) -> Tensor:
        """Return codes uint8 [n, length] with nearly the least Σ gain · (x - table[state])² of each sequence.

        Args:
            x: float32 [n, length], of moderate size.
            gain: float32 [n, length], positive, of moderate size.
            table: float32 [2**state_bits].
        """


def encode(x: Tensor, gain: Tensor, table: Tensor, bits: int) -> Tensor:
    """See `Encode`."""
    if too_short(x.shape[1], table.numel(), bits):
        return try_all(x, gain, table, bits)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    step = max(1, _AT_ONCE // (table.numel() * (16 + (x.shape[1] >> bits))))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        codes[part] = _encode(x[part], gain[part], table, bits)
    return codes


def too_short(length: int, n_states: int, bits: int) -> bool:
    """True if a sequence has hardly more bits than the overlap of two successive states, or fewer."""
    return length * bits <= max(_FEW_BITS, n_states.bit_length() - 1 - bits)


def try_all(x: Tensor, gain: Tensor, table: Tensor, bits: int) -> Tensor:
    """`Encode` for sequences that are `too_short`, by comparing all code sequences."""
    length = x.shape[1]
    every = torch.arange(2 ** (length * bits), device=x.device)
    shifts = bits * torch.arange(length, device=x.device)
    codes = ((every.unsqueeze(1) >> shifts) & (2**bits - 1)).to(torch.uint8)  # [sequences, length]
    found = table[states(codes, bits, table.numel().bit_length() - 1)]
    cost = torch.zeros(x.shape[0], every.numel(), device=x.device)
    for i in range(length):
        cost += gain[:, i : i + 1] * (x[:, i : i + 1] - found[:, i]).square()
    return codes[_first_least(cost)]


def seam(length: int) -> tuple[int, int]:
    """Return the first weight and the number of weights of the first pass, which is centred on the sequence's ends."""
    side = min(AROUND, length)
    return length - side, 2 * side


def _encode(x: Tensor, gain: Tensor, table: Tensor, bits: int) -> Tensor:
    length, n_from = x.shape[1], table.numel() >> bits
    first, count = seam(length)
    around = (torch.arange(count, device=x.device) + first) % length
    least = torch.zeros(x.shape[0], n_from, device=x.device)
    choices, least = _forward(x[:, around], gain[:, around], table, bits, least)
    path = _trace(choices, _first_least(least.view(torch.int32)), bits)
    last = path[:, count // 2 - 1] % n_from  # the overlap at the seam
    least = torch.full((x.shape[0], n_from), FORBIDDEN, device=x.device)
    least.scatter_(1, last.unsqueeze(1), 0.0)
    choices, _ = _forward(x, gain, table, bits, least)
    return (_trace(choices, last, bits) & (2**bits - 1)).to(torch.uint8)


def _forward(x: Tensor, gain: Tensor, table: Tensor, bits: int, least: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the choices h after each weight, uint8 [n, S] each, and the last least costs."""
    size = 2**bits
    tags = torch.arange(size, dtype=torch.int32, device=x.device).view(1, -1, 1)
    choices = []
    for i in range(x.shape[1]):
        entering = (x[:, i, None] - table).square() * gain[:, i, None]
        cost = (least.repeat_interleave(size, dim=1) + entering).view(torch.int32)
        tagged = (cost.view(cost.shape[0], size, -1) & -size) | tags
        smallest = tagged.amin(dim=1)
        choices.append((smallest & (size - 1)).to(torch.uint8))
        least = smallest.view(torch.float32)
    return choices, least


def _trace(choices: list[Tensor], last: Tensor, bits: int) -> Tensor:
    """Return the states of the best paths, int64 [n, length], that end in the overlap `last`, int64 [n]."""
    n_from = choices[0].shape[1]
    path = []
    for choice in reversed(choices):
        state = choice.gather(1, last.unsqueeze(1)).squeeze(1).long() * n_from + last
        path.append(state)
        last = state >> bits
    return torch.stack(path[::-1], dim=1)


def _first_least(costs: Tensor) -> Tensor:
    """Return the first index of the smallest entry of each row."""
    index = torch.arange(costs.shape[1], device=costs.device)
    smallest = costs.amin(dim=1, keepdim=True)
    return torch.where(costs == smallest, index, costs.shape[1]).amin(dim=1)
