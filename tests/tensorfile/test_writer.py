"""Bytes of tensors."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.tensorfile.writer import tensor_bytes


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(64.0).reshape(2, 32)[:1, 3:4].T,
        torch.arange(64.0).reshape(2, 32)[1:, ::32],
        torch.arange(64.0)[5:9],
        torch.arange(64.0).reshape(8, 8).T,
        torch.arange(4.0).reshape(2, 2)[:, :0],
        torch.tensor(3.5),
    ],
    ids=["one element, transposed", "one element, strided", "offset", "transposed", "empty", "scalar"],
)
def test_tensors_of_any_strides_have_their_bytes(tensor: torch.Tensor) -> None:
    assert bytes(tensor_bytes(tensor)) == tensor.numpy().tobytes()
