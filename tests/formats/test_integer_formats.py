"""Containers of integers: exact decode, the libraries' own unpacking, the real loaders, what is refused."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from support.handmade import two_layer_llama
from torch import Tensor

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix
from loftq_cli.artifacts.manifest import Manifest
from loftq_cli.errors import UsageError
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPES, GridRequest, QuantizedMatrix, Refusal
from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.grid import Grid, Quantized, dequantize

MODULE = "model.layers.0.mlp.up_proj"
BITS = (2, 3, 4, 8)
NAMES = ("gptq", "gptq-v2", "compressed-tensors", "packed", "dense")


def matrix(name: str, shape: tuple[int, int], bits: int, **more) -> QuantizedMatrix | Refusal:
    request = {
        "kind": "linear",
        "data_type": "int",
        "block_size": 64,
        "dtype": torch.bfloat16,
        "module": MODULE,
        **more,
    }
    request.setdefault("scale_rule", "minmax")
    grid = get_format(name).grid(GridRequest(out_features=shape[0], in_features=shape[1], bits=bits, **request))
    return grid if isinstance(grid, Refusal) else QuantizedMatrix(f"{MODULE}.weight", MODULE, "linear", *shape, grid)


def held(name: str, shape: tuple[int, int], bits: int, **more) -> QuantizedMatrix:
    item = matrix(name, shape, bits, **more)
    assert isinstance(item, QuantizedMatrix), item
    return item


def quantize(x: Tensor, grid: Grid) -> Quantized:
    return block_quantizer(grid, "cpu").quantize_residual(x, x).quantized


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_planned_is_encoded_and_decodes_to_what_was_optimised(name: str, dtype: torch.dtype) -> None:
    for bits, symmetric, group_size in itertools.product(BITS, (True, False), (32, 64, 128, 0)):
        item = held(name, (64, 384), bits, symmetric=symmetric, block_size=group_size, dtype=dtype)
        quantized = quantize(weights(64, 384), item.grid)
        encoded = get_format(name).encode(item, quantized)
        planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in get_format(name).tensors(item)}
        assert {key: (value.dtype, tuple(value.shape)) for key, value in encoded.items()} == planned
        q = get_format(name).decode(item, encoded.__getitem__)
        assert torch.equal(q, dequantize(quantized, item.grid))
        assert torch.equal(q, q.to(dtype).float()), "the loader's own rounding is part of Q"


def gptq_dequantized(tensors: dict[str, Tensor], bits: int, zero_is_one_less: bool) -> Tensor:
    """GPTQ's unpacking as its reference kernels state it, 3 bits word by word: float16 [in, out]."""
    packed, zeros, scales, index = (
        tensors[f"{MODULE}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")
    )  # fmt: skip
    if bits == 3:
        rows = packed.reshape(-1, 3, packed.shape[1]).long() & 0xFFFFFFFF
        first = [(rows[:, 0] >> shift) & 7 for shift in range(0, 30, 3)]
        first.append(rows[:, 0] >> 30 & 3 | (rows[:, 1] & 1) << 2)
        second = [(rows[:, 1] >> shift) & 7 for shift in range(1, 31, 3)]
        second.append(rows[:, 1] >> 31 & 1 | (rows[:, 2] & 3) << 1)
        third = [(rows[:, 2] >> shift) & 7 for shift in range(2, 32, 3)]
        codes = torch.stack(first + second + third, dim=1).reshape(-1, packed.shape[1])
        words = zeros.reshape(zeros.shape[0], -1, 3).long() & 0xFFFFFFFF
        bits_of = torch.cat([(words[..., i : i + 1] >> torch.arange(32)) & 1 for i in range(3)], dim=-1)
        points = (bits_of.reshape(zeros.shape[0], -1, 3) * torch.tensor([1, 2, 4])).sum(-1)
    else:
        shifts = torch.arange(0, 32, bits)
        codes = (packed.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)
        codes = codes.reshape(-1, packed.shape[1])
        points = ((zeros.unsqueeze(2) >> shifts.view(1, 1, -1)) & (2**bits - 1)).reshape(zeros.shape[0], -1)
    points = points + 1 if zero_is_one_less else points
    return scales[index.long()] * (codes - points[index.long()]).to(torch.float16)


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_bytes_unpack_as_the_reference_kernels_do(name: str, bits: int) -> None:
    for symmetric, group_size in itertools.product((True, False), (32, 64, 128, 0)):
        item = held(name, (96, 256), bits, symmetric=symmetric, block_size=group_size, dtype=torch.float32)
        encoded = get_format(name).encode(item, quantize(weights(96, 256), item.grid))
        theirs = gptq_dequantized(encoded, bits, zero_is_one_less=name == "gptq").T.float()
        assert torch.equal(theirs, get_format(name).decode(item, encoded.__getitem__))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_compressed_tensors_decompresses_to_q(bits: int, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    name = "compressed-tensors"
    for symmetric, group_size in itertools.product((True, False), (32, 128, 0)):
        item = held(name, (48, 384), bits, symmetric=symmetric, block_size=group_size, dtype=dtype)
        encoded = get_format(name).encode(item, quantize(weights(48, 384), item.grid))
        config = get_format(name).quantization_config([item], [], dtype)
        state = {key.removeprefix(f"{MODULE}."): value for key, value in encoded.items()}
        theirs = PackedQuantizationCompressor.decompress(
            state, QuantizationScheme(**config["config_groups"]["group_0"])
        )
        assert torch.equal(theirs["weight"].float(), get_format(name).decode(item, encoded.__getitem__))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random two-layer Llama in every dtype."""
    model, folder = two_layer_llama(), tmp_path_factory.mktemp("llamas")
    for name in ("float32", "bfloat16", "float16"):
        model.to(DTYPES[name]).save_pretrained(folder / name)
    return {name: folder / name for name in ("float32", "bfloat16", "float16")}


def check_exact(out: Path, manifest: Manifest, weight_of) -> None:
    assert len(manifest.matrices) == 14
    assert loftq_cli.verify(out, source=manifest.source).problems == ()
    for record in manifest.matrices:
        assert torch.equal(weight_of(record.module), decode_matrix(out, manifest, record)), record.module


def convert(source: Path, out: Path, **recipe) -> Manifest:
    return loftq_cli.quantize(source, output=out, group_size=32, rank=4, iters=2, **recipe)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_transformers_loads_compressed_tensors_exactly(
    bits: int, dtype: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    """Unpacked while loading, with adapter; and kept packed, as far as the library can."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    for symmetric in (True, False):
        out = tmp_path / f"out{symmetric}"
        manifest = convert(llamas[dtype], out, bits=bits, format="compressed-tensors", symmetric=symmetric)
        model = loftq_cli.load(out, trainable=True)
        base = model.base_model.model
        assert base.dtype == DTYPES[dtype]
        check_exact(out, manifest, lambda path: base.get_submodule(path).base_layer.weight.float())  # noqa: B023
    out = tmp_path / "packed"
    manifest = convert(llamas[dtype], out, bits=bits, format="compressed-tensors", symmetric=True, dequantize=False)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model(torch.arange(8).unsqueeze(0))
    check_exact(out, manifest, lambda path: model.get_submodule(path).weight.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_gptqmodel_loads_gptq_exactly(
    name: str, bits: int, dtype: str, llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None:
        pytest.skip("gptqmodel and optimum are not installed (pip install optimum gptqmodel)")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    for symmetric in (True, False):
        out = tmp_path / f"out{symmetric}"
        manifest = convert(llamas[dtype], out, bits=bits, format=name, symmetric=symmetric)
        model = loftq_cli.load(out, trainable=True)
        base = model.base_model.model
        rounded = DTYPES[dtype]

        def weight_of(path: str) -> Tensor:
            layer = base.get_submodule(path).base_layer  # noqa: B023
            return layer.dequantize_weight().T.to(rounded).float()  # noqa: B023

        check_exact(out, manifest, weight_of)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_transformers_loads_double_quantization_exactly(
    bits: int, dtype: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    out = tmp_path / "out"
    manifest = loftq_cli.quantize(
        llamas[dtype], output=out, bits=bits, format="bnb", double_quant=True, rank=4, iters=2
    )
    base = loftq_cli.load(out, trainable=True).base_model.model

    def weight_of(path: str) -> Tensor:
        weight = base.get_submodule(path).base_layer.weight
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()

    check_exact(out, manifest, weight_of)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_packed_and_dense_integers_load_exactly(bits: int, dtype: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    for name, symmetric in itertools.product(("packed", "dense"), (True, False)):
        out = tmp_path / f"{name}{symmetric}"
        manifest = convert(llamas[dtype], out, bits=bits, format=name, data_type="int", symmetric=symmetric)
        base = loftq_cli.load(out, trainable=True).base_model.model

        def weight_of(path: str) -> Tensor:
            layer = base.get_submodule(path).base_layer  # noqa: B023
            return layer.dequantized_weight().float() if name == "packed" else layer.weight.float()  # noqa: B023

        check_exact(out, manifest, weight_of)


def test_refusals_name_a_format_that_can() -> None:
    for name in ("gptq", "gptq-v2", "compressed-tensors", "bnb"):
        data_type = "int" if name == "bnb" else "nf"
        refused = [matrix(name, (64, 128), 4, data_type=data_type), matrix(name, (64, 128), 4, kind="embedding")]
        if name != "bnb":
            refused.append(matrix(name, (64, 96), 4))
        for refusal in refused:
            assert isinstance(refusal, Refusal) and refusal.fatal and "--format packed" in refusal.reason


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"format": "gptq", "data_type": "nf"}, "not 'nf' levels"),
        ({"format": "gptq", "group_size": 128}, "groups of 128 do not divide rows of 160"),
        ({"format": "gptq", "group_size": 32, "rule": ["layers.0=8"]}, "one bit width"),
        ({"format": "compressed-tensors", "group_size": 32, "rule": ["layers.0=8"]}, "--compressed"),
        ({"format": "compressed-tensors", "group_size": 32, "symmetric": False, "dequantize": False}, "--symmetric"),
        ({"format": "gptq", "embeddings": "quantize"}, "embeddings"),
        ({"format": "packed", "group_size": 64}, "--data-type int"),
        ({"format": "packed", "scale": "mse"}, "--data-type int"),
        ({"format": "bnb", "data_type": "int"}, "not integers"),
    ],
)
def test_what_a_container_cannot_hold_is_refused_before_any_work(
    recipe: dict, words: str, llamas: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        loftq_cli.plan(llamas["float32"], **{"bits": 4, **recipe})
    assert str(caught.value).count(". ") == 0


def test_encoders_do_not_fit_gptq(minilm: Path) -> None:
    with pytest.raises(UsageError, match=r"decoder-only.*--format packed"):
        loftq_cli.plan(minilm, bits=4, format="gptq")
