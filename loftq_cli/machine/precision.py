"""Compute float32 products in full precision, whatever the caller or an environment variable has set in torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 and bfloat16 for float32 products, and sum bfloat16 products in float32, while the block runs.

    TF32 keeps three digits: the recorded residual would not match the files. This applies to the whole process; the
    previous settings are restored at the end. Also a decorator.
    """
    import torch

    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" and torch.cuda.is_available():
        warnings.warn(
            "NVIDIA_TF32_OVERRIDE=1 rounds products to three digits inside NVIDIA's libraries: unset it, or the "
            "recorded residuals will not match the files",
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
    """Return a function that restores the current settings.

    torch has an old and a new interface, and the old one raises if the new one has been used.
    """
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
