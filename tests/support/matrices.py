"""Random weight matrices."""

from __future__ import annotations

import torch


def weight(rows: int = 96, columns: int = 160, seed: int = 0) -> torch.Tensor:
    """Return a matrix with heavy tails and a decaying spectrum, like trained ones."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 12, generator=generator) * torch.logspace(0, -1, 12)
    return left @ torch.randn(12, columns, generator=generator) * 0.3 + torch.randn(rows, columns, generator=generator)
