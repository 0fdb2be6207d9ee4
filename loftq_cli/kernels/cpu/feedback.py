"""Error feedback in one pass over memory, compiled by numba: `numerics.quantizers.feedback`, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from loftq_cli.kernels.cpu.blocks import _inline, _kernel

CHUNK = 1 << 14  # elements whose squares are summed together, so that sums do not depend on the number of threads
_TILE = 1 << 9

_I32 = np.int32


@_inline
def _widen(half: Any, bits: Any) -> None:
    for i in range(half.size):
        bits[i] = _I32(half[i]) << 16


@_inline
def _advance(weight: Any, product: Any, residual: Any, fed: Any, lanes: Any, kept: Any, added: Any, share: Any) -> None:
    for i in range(weight.size):
        error = residual[i] - product[i]
        fed[i] = kept * fed[i] + added * error
        residual[i] = (weight[i] - product[i]) + share * fed[i]
        wide = np.float64(error)
        lanes[i] += wide * wide


@_kernel
def feed_chunks(
    weight: Any, product: Any, half: Any, residual: Any, fed: Any, sums: Any, kept: Any, added: Any, share: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """Apply `numerics.quantizers.feedback.feed_back` to chunks `first`..`last`; write the squared norms of E to `sums`.

    All arrays are float32 [n] except `sums`, float64 [n_chunks], and `half`, uint16 [n], which holds BA as bfloat16
    bits if `product` is empty.
    """
    wide, lanes = np.empty(_TILE, np.float32), np.empty(_TILE, np.float64)
    bits = wide.view(np.int32)
    for chunk in range(first, last):
        lanes[:] = 0.0
        for begin in range(chunk * CHUNK, min((chunk + 1) * CHUNK, weight.size), _TILE):
            end = min(begin + _TILE, weight.size)
            here = wide[: end - begin]
            if half.size:
                _widen(half[begin:end], bits)
            else:
                here[:] = product[begin:end]
            _advance(weight[begin:end], here, residual[begin:end], fed[begin:end], lanes, kept, added, share)
        sums[chunk] = lanes.sum()
