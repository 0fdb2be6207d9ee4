"""CPU results that do not depend on the number of threads, so that every worker computes the same bits.

torch's float32 and float64 products and row norms have this property already. LAPACK's decompositions and oneDNN's
bfloat16 products, which may split the inner dimension among threads, do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

_PANEL = 512  # rows of a product that one thread computes
_WHOLE = 768  # up to this many rows, a second panel costs more than a second thread saves
_TRIANGLE = 4  # panels of a symmetric product of which only one triangle is needed


def one_thread(decompose: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Make a decomposition run on one thread for CPU matrices; other devices are unaffected."""

    @wraps(decompose)
    def alone(matrix: Tensor) -> Any:
        threads = torch.get_num_threads()
        if matrix.device.type != "cpu" or threads == 1:
            return decompose(matrix)
        torch.set_num_threads(1)
        try:
            return decompose(matrix)
        finally:
            torch.set_num_threads(threads)

    return alone


cholesky = one_thread(torch.linalg.cholesky_ex)
_eigh_on_cpu = one_thread(torch.linalg.eigh)
qr, svd = one_thread(torch.linalg.qr), one_thread(partial(torch.linalg.svd, full_matrices=False))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [..., k], ascending, and eigenvectors of symmetric [..., k, k], from their lower triangles.

    If a GPU's solver fails, LAPACK is used.

    Raises:
        torch.linalg.LinAlgError: LAPACK does not converge.
    """
    if matrix.device.type != "cpu":
        try:
            return torch.linalg.eigh(matrix)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # some versions of cuSOLVER fail on spectra that LAPACK handles
            values, vectors = _eigh_on_cpu(matrix.cpu())
            return values.to(matrix.device), vectors.to(matrix.device)
    return _eigh_on_cpu(matrix)


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return `left` [m, k] @ `right` [k, n]; bfloat16 on the CPU is computed in panels of rows, one thread each."""
    if left.device.type != "cpu" or left.dtype != torch.bfloat16:
        return torch.mm(left, right, out=out)
    result = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype) if out is None else out
    rows = left.shape[0]
    panel = _PANEL if rows > _WHOLE else rows

    def work(start: int) -> None:
        torch.mm(left[start : start + panel], right, out=result[start : start + panel])

    _share(work, range(0, rows, panel))
    return result


def lower_gram(matrix: Tensor) -> Tensor:
    """Return MᵀM [k, k] of M [n, k] for `eigh`, which reads the lower triangle; on the CPU the rest is zero."""
    if matrix.device.type != "cpu":
        return matrix.T @ matrix
    width = matrix.shape[1]
    gram = matrix.new_zeros(width, width)
    panel = -(-width // _TRIANGLE)

    def work(start: int) -> None:
        end = min(start + panel, width)
        torch.mm(matrix[:, start:end].T, matrix[:, :end], out=gram[start:end, :end])

    _share(work, range(0, width, panel)[::-1])  # longest panel first
    return gram


def _share(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Run `work` on every panel, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(starts))
    if threads == 1 and torch.get_num_threads() == 1:
        for start in starts:
            work(start)
    else:
        list(_pool(os.getpid(), threads).map(work, starts))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads on which torch is single-threaded; one pool per process, as threads do not survive a fork."""
    return ThreadPoolExecutor(threads, "loftq-product", initializer=torch.set_num_threads, initargs=(1,))
