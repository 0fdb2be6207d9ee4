"""Whatever the caller or an environment variable asked torch for, LoftQ's float32 products are float32's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 for float32 products, and float32 sums of bfloat16 ones, until the end.

    A TF32 product has three digits: the residual recorded would not be the one of the files. For a whole process; what
    was set before is set again. Also a decorator.
    """
    import torch

    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" and torch.cuda.is_available():
        warnings.warn(
            "NVIDIA_TF32_OVERRIDE=1 rounds products to three digits inside NVIDIA's libraries: unset it, or the "
            "residuals recorded will not be those of the files",
            stacklevel=3,
        )
    matmul = torch.backends.cuda.matmul
    restore = _restoring()
    sums = matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = sums
        restore()


def _restoring() -> Callable[[], None]:
    """torch has an old and a new way to say it, and the old one cannot be asked once the new one was used."""
    import torch

    mkldnn: Any = torch.backends.mkldnn
    try:
        before = torch.get_float32_matmul_precision()
        return lambda: torch.set_float32_matmul_precision(before)
    except RuntimeError:
        backends = torch.backends.cuda.matmul, mkldnn.matmul
        asked = [backend.fp32_precision for backend in backends]

        def restore() -> None:
            for backend, precision in zip(backends, asked):
                backend.fp32_precision = precision

        return restore
