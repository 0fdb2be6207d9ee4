"""Containers: golden bytes, exact decode, bitsandbytes' own bytes, what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from loftq_cli.errors import UsageError
from loftq_cli.formats import FORMATS, get_format
from loftq_cli.formats.base import DTYPES, GridRequest, QuantizedMatrix, Refusal
from loftq_cli.formats.bnb.format import safe_block_size
from loftq_cli.numerics.grids.blocks import BlockGrid, dequantize, quantize
from loftq_cli.numerics.grids.nested import dynamic_map, quantize_scales

SHAPES = ((8, 128), (7, 100), (5, 33), (3, 1))


def matrix(name: str, shape: tuple[int, int], bits: int, **more) -> QuantizedMatrix | Refusal:
    request = {"kind": "linear", "data_type": "nf", "block_size": 64, "dtype": torch.float32, **more}
    grid = get_format(name).grid(GridRequest(out_features=shape[0], in_features=shape[1], bits=bits, **request))
    if isinstance(grid, Refusal):
        return grid
    return QuantizedMatrix("a.b.weight", "a.b", request["kind"], *shape, grid)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_planned_is_encoded_and_decodes_to_what_was_optimised(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kinds = ("linear", "conv1d", "embedding")
    for shape, bits, kind, data_type in itertools.product(SHAPES, (2, 3, 4, 8), kinds, ("nf", "nf-sym", "uniform")):
        item = matrix(name, shape, bits, kind=kind, dtype=dtype, data_type=data_type)
        if isinstance(item, Refusal):
            assert name not in ("packed", "dense")
            continue
        quantized = quantize(torch.randn(shape), item.grid)
        encoded = get_format(name).encode(item, quantized)
        planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in get_format(name).tensors(item)}
        assert {key: (value.dtype, tuple(value.shape)) for key, value in encoded.items()} == planned
        q = get_format(name).decode(item, encoded.__getitem__)
        assert torch.equal(q, dequantize(quantized, item.grid))
        assert torch.equal(q, q.to(dtype).float()), "the loader's own rounding is part of Q"


def test_packed_bytes_are_golden() -> None:
    item = matrix("packed", (2, 5), 2)
    w = torch.tensor([[1.0, -1.0, 0.0, 0.5, 0.1], [-2.0, 2.0, 0.6, 0.8, 0.0]])
    encoded = get_format("packed").encode(item, quantize(w, item.grid))
    # NF2 is (-1, 0, .338, 1): codes 3 0 1 2 1 and, scaled by 2, 0 3 2 2 1; five codes take two bytes, low bits first.
    assert encoded["a.b.weight"].tolist() == [[0b10_01_00_11, 0b01], [0b10_10_11_00, 0b01]]
    assert encoded["a.b.weight_absmax"].tolist() == [[1.0], [2.0]]


def test_packed_config_says_how_to_read_it() -> None:
    items = [matrix("packed", (8, 128), bits) for bits in (2, 4, 2)]
    config = get_format("packed").quantization_config(items, [], torch.bfloat16)
    assert config["quant_method"] == "loftq" and config["dtype"] == "bfloat16"
    assert [(group["bits"], len(group["modules"])) for group in config["groups"]] == [(2, 2), (4, 1)]
    levels = json.loads(json.dumps(config))["groups"][0]["levels"]
    assert torch.equal(torch.tensor(levels), torch.tensor(items[0].grid.codebook.levels))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(16, 128), (7, 100), (33, 65), (3, 33), (10, 72)])
def test_bnb_bytes_equal_bitsandbytes_own(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    w = torch.randn(shape).to(dtype)
    w[0, : min(4, shape[1])] = 0
    item = matrix("bnb", shape, 4, dtype=dtype)
    ours = get_format("bnb").encode(item, quantize(w.float(), item.grid))
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    packed = state.as_dict(packed=True)
    assert torch.equal(ours["a.b.weight"], theirs)
    for key, value in packed.items():
        mine = ours[f"a.b.weight.{key}"]
        if "quant_state" in key:
            assert json.loads(bytes(mine.tolist())) == json.loads(bytes(value.tolist()))
        else:
            assert torch.equal(mine, value), key
    decoded = get_format("bnb").decode(item, ours.__getitem__)
    assert torch.equal(decoded, functional.dequantize_4bit(theirs, state).float())


@pytest.mark.parametrize("in_features", [32, 48, 64, 65, 72, 80, 96, 100, 128, 160, 176, 320, 384, 704, 1000])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
def test_bitsandbytes_reads_every_block_size_we_write(in_features: int, block_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    item = matrix("bnb", (12, in_features), 2, block_size=block_size)
    if isinstance(item, Refusal):
        assert not item.fatal and in_features % 32 and in_features % 16 == 0
        return
    assert item.grid.block_size == safe_block_size(block_size, in_features) <= block_size
    torch.manual_seed(2)
    ours = get_format("bnb").encode(item, quantize(torch.randn(12, in_features), item.grid))
    prefix = "a.b.weight."
    state = functional.QuantState.from_dict(
        {key.removeprefix(prefix): value for key, value in ours.items() if key.startswith(prefix)}, device="cpu"
    )
    theirs = functional.dequantize_4bit(ours["a.b.weight"], state)
    assert torch.equal(theirs, get_format("bnb").decode(item, ours.__getitem__))


def test_nested_map_and_scales_are_bitsandbytes_own() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(dynamic_map()), functional.create_dynamic_map())
    for n in (3, 256, 1000):
        scales = torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.1
        ours = quantize_scales(scales)
        state = functional.QuantState(absmax=ours.absmax, code=torch.tensor(dynamic_map()), blocksize=256)
        state.dtype = torch.float32
        theirs = functional.dequantize_blockwise(ours.codes, state) + ours.offset
        assert torch.equal(ours.dequantized(), theirs)
        levels = torch.tensor(dynamic_map())
        centred = (scales - ours.offset) / ours.absmax.repeat_interleave(256)[:n]
        nearest = (centred.unsqueeze(1) - levels).abs().amin(1)
        assert torch.allclose((levels[ours.codes.int()] - centred).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_bitsandbytes_reads_double_quantization_exactly(dtype: torch.dtype, bits: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((64, 512), (12, 72), (3, 64)):
        item = matrix("bnb", shape, bits, dtype=dtype, double_quant=True)
        w = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        w[0] = 0
        quantized = quantize(w, item.grid)
        ours = get_format("bnb").encode(item, quantized)
        planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in get_format("bnb").tensors(item)}
        assert {key: (value.dtype, tuple(value.shape)) for key, value in ours.items()} == planned
        prefix = "a.b.weight."
        state = functional.QuantState.from_dict(
            {key.removeprefix(prefix): value for key, value in ours.items() if key.startswith(prefix)}, device="cpu"
        )
        theirs = functional.dequantize_4bit(ours["a.b.weight"], state).float()
        decoded = get_format("bnb").decode(item, ours.__getitem__)
        assert torch.equal(theirs, decoded) and torch.equal(decoded, dequantize(quantized, item.grid))
        plain = matrix("bnb", shape, bits, dtype=dtype)
        assert item.grid.information_bits(*shape) < plain.grid.information_bits(*shape) + 64


@pytest.mark.parametrize("name", ["packed", "dense", "gptq", "compressed-tensors"])
def test_double_quantization_is_bitsandbytes_alone(name: str) -> None:
    refusal = matrix(name, (64, 128), 4, double_quant=True, data_type="int" if "t" in name else "nf")
    assert isinstance(refusal, Refusal) and refusal.fatal and "--format bnb" in refusal.reason


def test_bnb_refuses_what_it_cannot_hold() -> None:
    for bits, data_type in ((3, "nf"), (8, "nf"), (4, "uniform"), (2, "nf-sym")):
        refusal = matrix("bnb", (8, 128), bits, data_type=data_type)
        assert isinstance(refusal, Refusal) and refusal.fatal and "--format packed" in refusal.reason
    assert isinstance(matrix("bnb", (8, 128), 4, kind="embedding"), Refusal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4])
def test_bnb_dense_and_dense_requantized_are_identical(dtype: torch.dtype, bits: int) -> None:
    """Scales rounded to the model's dtype: loading the dense file with load_in_4bit gives the pre-quantized bytes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(3)
    w = torch.randn(64, 256)
    bnb, dense = matrix("bnb", (64, 256), bits, dtype=dtype), matrix("dense", (64, 256), bits, dtype=dtype)
    packed = get_format("bnb").encode(bnb, quantize(w, bnb.grid))
    plain = get_format("dense").encode(dense, quantize(w, dense.grid))["a.b.weight"]
    assert torch.equal(plain.float(), get_format("bnb").decode(bnb, packed.__getitem__))
    again, state = functional.quantize_4bit(plain, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(again, packed["a.b.weight"]) and torch.equal(state.absmax, packed["a.b.weight.absmax"])


def test_dense_conv1d_keeps_its_orientation() -> None:
    item = matrix("dense", (6, 64), 4, kind="conv1d")
    encoded = get_format("dense").encode(item, quantize(torch.randn(6, 64), item.grid))
    assert encoded["a.b.weight"].shape == (64, 6)


def test_unknown_format_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="auto, packed, bnb, gptq"):
        get_format("awq")


def test_grid_counts_blocks_as_the_container_lays_them_out() -> None:
    grid = matrix("packed", (3, 100), 4).grid
    assert isinstance(grid, BlockGrid) and grid.n_blocks(3, 100) == 6
    flat = matrix("bnb", (3, 100), 4).grid
    assert isinstance(flat, BlockGrid) and flat.n_blocks(3, 100) == 5


def test_skip_list_never_catches_a_packed_module() -> None:
    """transformers matches entries as suffixes too: `head` would also skip `layers.0.overhead`."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    item = matrix("bnb", (8, 128), 4)
    packed = [
        QuantizedMatrix(f"{name}.weight", name, "linear", 8, 128, item.grid) for name in ("layers.0.overhead", "a.fc")
    ]
    dense = ["head", "fc", "lm_head"]
    entries = get_format("bnb").quantization_config(packed, dense, torch.float32)["llm_int8_skip_modules"]
    assert "lm_head" in entries
    for name in dense:
        assert not should_convert_module(name, entries)
    for target in packed:
        assert should_convert_module(target.module, entries)
