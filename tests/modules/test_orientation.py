"""The orientation of stored matrices: turning there and back gives the same."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.modules.experts import Expert
from loftq_cli.modules.orientation import Orientation, orientation_of


@pytest.mark.parametrize("kind", ["linear", "head", "embedding", "expert", "other"])
def test_most_matrices_are_stored_as_the_layer_computes(kind: str) -> None:
    assert orientation_of(kind) is Orientation.OUT_IN


def test_conv1d_and_some_experts_are_stored_the_other_way() -> None:
    assert orientation_of("conv1d") is Orientation.IN_OUT
    assert orientation_of("expert", Expert(0, 4, stacked=True)) is Orientation.OUT_IN
    assert orientation_of("expert", Expert(0, 4, stacked=True, transposed=True)) is Orientation.IN_OUT


@pytest.mark.parametrize("orientation", Orientation)
def test_turning_twice_changes_nothing(orientation: Orientation) -> None:
    stored = torch.arange(6).reshape(2, 3)
    turned = orientation.turn(stored)
    assert tuple(turned.shape) == orientation.turn_shape((2, 3)) == ((3, 2) if orientation.transposed else (2, 3))
    assert torch.equal(orientation.turn(turned), stored)
    assert turned.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr(), "a view"
