"""The Viterbi algorithm of `numerics.quantizers.viterbi`, bit for bit, compiled by numba.

Several sequences are processed together, one per lane of the innermost arrays, so that LLVM vectorises over sequences;
its loops take their length from an array, because loops of constant length are unrolled before they are vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq_cli.kernels.cpu.block_quantizer import _share
from loftq_cli.kernels.cpu.blocks import _kernel
from loftq_cli.numerics.quantizers import viterbi as plain

LANES = 32  # sequences processed together: costs of 1024 states fill a quarter of a second-level cache

_I32, _U8 = np.int32, np.uint8


def encode(x: Tensor, gain: Tensor, table: Tensor, bits: int) -> Tensor:
    """See `numerics.quantizers.viterbi.Encode`; on the CPU."""
    if plain.too_short(x.shape[1], table.numel(), bits):
        return plain.try_all(x, gain, table, bits)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    arrays = x.contiguous().numpy(), gain.contiguous().numpy(), table.numpy(), codes.numpy()
    settings = bits, *plain.seam(x.shape[1]), np.float32(plain.FORBIDDEN)

    def work(first: int, last: int) -> None:
        encode_groups(*arrays, *settings, first, last)

    _share(work, -(-x.shape[0] // LANES))
    return codes


@_kernel
def _least(cost: Any, least: Any, choice: Any, size: Any) -> None:
    """Find the cheapest predecessor's cost and its highest bits. All costs are tagged on the way."""
    n_from = least.shape[0]
    for p in range(n_from):
        out, first, chosen = least[p], cost[p], choice[p]
        keep, low = _I32(-size), _I32(size - 1)
        for lane in range(out.size):
            out[lane] = first[lane] & keep
        for h in range(1, size):
            other, tag = cost[h * n_from + p], _I32(h)
            for lane in range(out.size):
                out[lane] = min(out[lane], (other[lane] & keep) | tag)
        for lane in range(out.size):
            chosen[lane] = _U8(out[lane] & low)


@_kernel
def _enter(cost: Any, least: Any, x: Any, gain: Any, table: Any, size: Any) -> None:
    """Add the cost of each state to the least cost of its predecessors."""
    for p in range(least.shape[0]):
        before = least[p]
        for n in range(size):
            value, out = table[p * size + n], cost[p * size + n]
            for lane in range(before.size):
                distance = x[lane] - value
                out[lane] = before[lane] + distance * distance * gain[lane]


@_kernel
def _forward(x: Any, gain: Any, table: Any, size: Any, cost: Any, least: Any, choices: Any) -> None:
    """Do all steps; x and gain [length, lanes]; cost [states, lanes], least [S, lanes] float32."""
    for i in range(x.shape[0]):
        _enter(cost, least, x[i], gain[i], table, size)
        _least(cost.view(_I32), least.view(_I32), choices[i], size)


@_kernel
def encode_groups(
    x: Any,
    gain: Any,
    table: Any,
    codes: Any,
    bits: Any,
    seam_first: Any,
    seam_count: Any,
    forbidden: Any,
    first: Any,
    last: Any,
) -> None:
    """Encode sequences of groups first..last - 1, `LANES` sequences each."""
    n, length = x.shape
    size = 1 << bits
    n_from = table.size // size
    cost = np.empty((table.size, LANES), np.float32)
    least = np.empty((n_from, LANES), np.float32)
    choices = np.empty((max(length, seam_count), n_from, LANES), _U8)
    own_x = np.zeros((length, LANES), np.float32)
    own_gain = np.zeros((length, LANES), np.float32)
    around_x = np.zeros((seam_count, LANES), np.float32)
    around_gain = np.zeros((seam_count, LANES), np.float32)
    for group in range(first, last):
        begin = group * LANES
        count = min(LANES, n - begin)
        for lane in range(count):
            for i in range(length):
                own_x[i, lane], own_gain[i, lane] = x[begin + lane, i], gain[begin + lane, i]
        for i in range(seam_count):
            around_x[i] = own_x[(seam_first + i) % length]
            around_gain[i] = own_gain[(seam_first + i) % length]
        least[:] = 0
        _forward(around_x, around_gain, table, size, cost, least, choices)
        ends = np.zeros(LANES, np.int64)
        bits_of = least.view(_I32)
        for lane in range(count):
            end = 0
            for p in range(1, n_from):
                if bits_of[p, lane] < bits_of[end, lane]:
                    end = p
            for i in range(seam_count - 1, seam_count // 2 - 1, -1):
                end = (choices[i, end, lane] * n_from + end) >> bits
            state = choices[seam_count // 2 - 1, end, lane] * n_from + end
            ends[lane] = state % n_from
        least[:] = forbidden
        for lane in range(count):
            least[ends[lane], lane] = 0
        _forward(own_x, own_gain, table, size, cost, least, choices)
        for lane in range(count):
            end = ends[lane]
            for i in range(length - 1, -1, -1):
                state = choices[i, end, lane] * n_from + end
                codes[begin + lane, i] = state & (size - 1)
                end = state >> bits
