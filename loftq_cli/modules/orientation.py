"""Orientation of a stored matrix: most are [out, in], as the layer computes; a few are [in, out]."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.modules.experts import Expert


class Orientation(Enum):
    """Order of a stored matrix's dimensions. `turn` works both ways: from stored to [out, in] and back."""

    OUT_IN = "[out, in]"
    IN_OUT = "[in, out]"

    @property
    def transposed(self) -> bool:
        """True if the checkpoint stores [in, out]."""
        return self is Orientation.IN_OUT

    def turn(self, weight: Tensor) -> Tensor:
        """Return a view that converts between the stored order and [out, in]."""
        return weight.T if self.transposed else weight

    def turn_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the view that `turn` returns."""
        return (shape[1], shape[0]) if self.transposed else shape


def orientation_of(kind: str, expert: Expert | None = None) -> Orientation:
    """Return a matrix's orientation: transformers' Conv1D is [in, out], and so are some tensors of stacked experts.

    Args:
        kind: as in `modules.roles.TensorRole`.
    """
    transposed = kind == "conv1d" or (expert is not None and expert.transposed)
    return Orientation.IN_OUT if transposed else Orientation.OUT_IN
