"""`pack-quantized` weights are what compressed-tensors' own compressor decodes them to."""

from __future__ import annotations

import itertools

import pytest
import torch

from loftq_cli.checkpoint.base import TensorInfo
from loftq_cli.checkpoint.int_packed import IntScheme, dequantize_int, find_int_packed, int_scheme, unpacked_info

ROWS, COLUMNS = 32, 128
GROUP = 32


def _as_infos(state: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        f"x.{name}": TensorInfo(f"x.{name}", tensor.dtype, tuple(tensor.shape), "model.safetensors", 0)
        for name, tensor in state.items()
    }


def _scales(strategy: str, dtype: torch.dtype) -> torch.Tensor:
    shape = {"group": (ROWS, COLUMNS // GROUP), "channel": (ROWS, 1), "tensor": (1,)}[strategy]
    return torch.rand(shape).add(0.1).mul(0.01).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_what_compressed_tensors_decodes(bits: int, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(bits)
    low, high = -(1 << bits - 1), 1 << bits - 1
    for strategy, symmetric in itertools.product(("group", "channel", "tensor"), (True, False)):
        if strategy == "tensor" and not symmetric:
            continue  # whose zero point is not packed; refused by name
        size = GROUP if strategy == "group" else None
        weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        scales = _scales(strategy, dtype)
        zeros = None if symmetric else torch.randint(low, high, scales.shape, dtype=torch.int8)
        weight = torch.randn(ROWS, COLUMNS).mul(0.02).to(dtype)
        state = {"weight": weight, "weight_scale": scales, **({} if zeros is None else {"weight_zero_point": zeros})}
        stored = PackedQuantizationCompressor.compress(state, scheme)
        theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert len(theirs.unique()) > bits

        read = int_scheme({"config_groups": {"group_0": scheme.model_dump()}})
        assert read == IntScheme(bits, symmetric, size)
        infos = _as_infos(stored)
        found = find_int_packed(infos, read)["x.weight"]
        info = unpacked_info("x.weight", found, infos)
        assert (info.shape, info.dtype) == (tuple(theirs.shape), theirs.dtype)
        ours = dequantize_int(stored["weight_packed"], scales, read, stored.get("weight_zero_point"))
        assert torch.equal(ours, theirs), (strategy, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_quantized_in_activation_order_are_decoded_by_their_groups(symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    scales = _scales("group", torch.bfloat16)
    zeros = (
        torch.zeros(scales.shape, dtype=torch.int8) if symmetric else torch.randint(-8, 8, scales.shape).to(torch.int8)
    )
    order = torch.randperm(COLUMNS)
    groups = (torch.arange(COLUMNS) // GROUP)[order]
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=GROUP)
    # The package itself dequantizes columns whose groups are consecutive; it no longer stores others.
    inverse = torch.argsort(order)
    theirs = dequantize(codes[:, inverse], scales, zeros, args)[:, order]
    packed_zeros = None if symmetric else pack_to_int32(zeros, 4, packed_dim=0)
    ours = dequantize_int(pack_to_int32(codes, 4), scales, IntScheme(4, symmetric, GROUP), packed_zeros, groups)
    assert torch.equal(ours, theirs)
