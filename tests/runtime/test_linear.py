"""Packed layers: every number equals the dense twin's, bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from support.packed_matrices import encoded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import DTYPES
from loftq_cli.numerics.grids import trellis
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.runtime import LoftqEmbedding, LoftqLinear, is_packable
from loftq_cli.runtime import decode as decode_module
from loftq_cli.runtime.codes import PackedCodes

SHAPES = ((8, 128), (7, 100), (5, 33), (3, 1))
BITS = (2, 3, 4, 8)
LEVELS = [(bits, "nf") for bits in BITS] + [(bits, "trellis") for bits in (2, 3, 4)]


def fill(layer: nn.Module, codes: Tensor, absmax: Tensor) -> None:
    layer.load_state_dict({"weight": codes, "weight_absmax": absmax}, strict=False)


def packed_linear(n_out: int, n_in: int, bits: int, dtype: torch.dtype, *, bias: bool = True, levels: str = "nf"):
    """A packed layer and the dense layer it must equal."""
    torch.manual_seed(0)
    grid, codes, absmax, q = encoded((n_out, n_in), bits, dtype, levels=levels)
    layer = LoftqLinear(n_in, n_out, bias, grid, dtype=dtype)
    fill(layer, codes, absmax)
    dense = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    dense.weight = nn.Parameter(q, requires_grad=False)
    if bias:
        layer.bias.data = dense.bias.data.clone()
    return layer, dense


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dequantized_weights_are_what_the_format_decodes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, (bits, levels), step in itertools.product((*SHAPES, (37, 50)), LEVELS, (200, 2**22)):
        monkeypatch.setattr(decode_module, "_STEP_CPU", step)
        monkeypatch.setattr(trellis, "PANEL", step)
        grid, codes, absmax, q = encoded(shape, bits, dtype, levels=levels)
        layer = LoftqLinear(shape[1], shape[0], False, grid)
        fill(layer, codes, absmax)
        assert layer.dequantized_weight().dtype == dtype
        assert torch.equal(layer.dequantized_weight(), q)
        for other in DTYPES.values():  # the stored rounding comes first, the cast to the model's dtype second
            assert torch.equal(layer.dequantized_weight(other), q.to(other))


def test_scales_larger_than_the_value_dtype_saturate() -> None:
    book = encoded((1, 2), 2, torch.float32)[0].codebook
    grid = BlockGrid(book, 32, "rows", scale_dtype=torch.float32, value_dtype=torch.float16)
    layer = LoftqLinear(2, 1, False, grid)
    fill(layer, torch.tensor([[0b1100]], dtype=torch.uint8), torch.tensor([[1e6]]))
    assert layer.dequantized_weight().tolist() == [[-65504.0, 65504.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
def test_forward_and_gradients_equal_the_dense_layer(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    for (bits, levels), bias in itertools.product(LEVELS, (True, False)):
        layer, dense = packed_linear(24, 40, bits, dtype, bias=bias, levels=levels)
        inputs = [torch.randn(*lead, 40).to(dtype).requires_grad_() for _ in range(1)]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        outputs = [module(x) for module, x in zip((layer, dense), inputs)]
        assert torch.equal(*outputs)
        grad = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(grad)
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        if bias:
            torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
        assert layer.weight.grad is None


def test_autocast_computes_as_the_dense_layer_does() -> None:
    layer, dense = packed_linear(24, 40, 3, torch.float32)
    x = torch.randn(4, 40)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            ours, theirs = layer(x), dense(x)
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)
        ours.float().sum().backward()


def test_no_dense_weight_is_saved_for_backward() -> None:
    layer, _ = packed_linear(64, 64, 2, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(torch.randn(3, 64, requires_grad=True))
    assert saved and all(tensor.numel() < 64 * 64 for tensor in saved)
    y.sum().backward()


def test_modes_without_gradients_and_a_second_derivative() -> None:
    layer, dense = packed_linear(8, 16, 4, torch.float32)
    x = torch.randn(2, 16)
    with torch.inference_mode():
        assert torch.equal(layer(x), dense(x))
    with torch.no_grad():
        assert not layer(x).requires_grad
    x.requires_grad_()  # an inference pass before it must not spoil training
    (grad,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    (theirs,) = torch.autograd.grad((dense(x) ** 2).sum(), x, create_graph=True)
    ours, theirs = (torch.autograd.grad(g.sum(), x)[0] for g in (grad, theirs))
    torch.testing.assert_close(ours, theirs)


def test_activations_cast_to_the_codes_dtype_are_refused() -> None:
    layer, _ = packed_linear(8, 16, 4, torch.float32)
    with pytest.raises(LoftqError, match=r"torch\.uint8 activations.*--rule"):
        layer(torch.zeros(2, 16).to(layer.weight.dtype))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "to": lambda m: m.to("cpu", torch.float16),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_the_model_never_touches_what_is_stored(cast: Callable, dtype: torch.dtype) -> None:
    layer, dense = packed_linear(24, 40, 2, dtype)
    table = LoftqEmbedding(24, 40, layer.grid, dtype=dtype)
    fill(table, layer.weight.detach(), layer.weight_absmax)
    both = cast(nn.ModuleList([layer, table]))
    for module in both:
        assert (module.weight.dtype, module.weight_absmax.dtype) == (torch.uint8, dtype)
        assert torch.equal(module.dequantized_weight(), dense.weight)
    new = cast(nn.Linear(1, 1)).weight.dtype
    assert layer.bias.dtype == new and layer(torch.zeros(1, 40, dtype=new)).dtype == new
    assert torch.equal(table(torch.tensor([1, 5])), dense.weight[[1, 5]].to(new))


def test_meta_layers_become_real() -> None:
    layer, dense = packed_linear(24, 40, 3, torch.bfloat16)
    empty = LoftqLinear(40, 24, True, layer.grid, device="meta", dtype=torch.bfloat16)
    assert empty.weight.is_meta and empty.weight_absmax.is_meta
    for assign in (False, True):
        other = copy.deepcopy(empty) if assign else empty.to_empty(device="cpu")
        assert other.weight_absmax.dtype == torch.bfloat16
        other.load_state_dict(layer.state_dict(), assign=assign)
        x = torch.randn(2, 40, dtype=torch.bfloat16)
        assert torch.equal(other(x), dense(x))


def test_copies_and_pickles_are_whole_and_name_no_class_of_ours() -> None:
    layer, dense = packed_linear(24, 40, 8, torch.float32)
    assert isinstance(layer.weight, PackedCodes) and layer.weight is layer._parameters["weight"]
    x = torch.randn(2, 40)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), dense(x))
        assert isinstance(other.weight, PackedCodes)
    state = dict(layer.named_parameters()) | layer.state_dict() | {"data": layer.weight.data}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["weight"], layer.weight) and type(loaded["data"]) is Tensor
    assert type(layer.state_dict()["weight"]) is Tensor


ARITHMETIC: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "merge": lambda layer, delta: layer.weight.data.__iadd__(delta),
    "safe merge": lambda layer, delta: layer.weight.data.clone().__iadd__(delta.to(torch.uint8)),
    "unmerge": lambda layer, delta: layer.weight.data.__isub__(delta.to(torch.uint8)),
    "sum": lambda layer, delta: delta + layer.weight,
    "product": lambda layer, delta: layer.weight * delta,
    "function": lambda layer, delta: torch.mul(layer.weight.data, delta),
    "assignment": lambda layer, delta: setattr(layer.weight, "data", delta),
}


@pytest.mark.parametrize("act", ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_on_codes_is_refused_and_changes_nothing(act: Callable) -> None:
    layer, _ = packed_linear(24, 40, 8, torch.float32)  # 8 bits: the shapes fit, nothing else would stop it
    before = layer.weight.detach().clone()
    with pytest.raises(LoftqError, match=r"call `model\.dequantize\(\)` first"):
        act(layer, torch.ones(24, 40))
    assert torch.equal(layer.weight, before)


def test_embeddings_dequantize_the_rows_asked_for() -> None:
    for (bits, levels), dtype in itertools.product(LEVELS, DTYPES.values()):
        grid, codes, absmax, q = encoded((50, 33), bits, dtype, "embedding", levels=levels)
        table = LoftqEmbedding(50, 33, grid, padding_idx=0, dtype=dtype)
        fill(table, codes, absmax)
        for ids in (torch.tensor([[3, 49, 3], [0, 1, 2]]), torch.tensor(7), torch.zeros(0, 2, dtype=torch.int32)):
            assert torch.equal(table(ids), nn.functional.embedding(ids, q))
        dense = table.dense(torch.float32)
        assert dense.padding_idx == 0 and torch.equal(dense.weight, q.float())
        with pytest.raises(IndexError):
            table(torch.tensor([50]))


def test_layers_say_what_they_are() -> None:
    layer, _ = packed_linear(24, 40, 3, torch.float32)
    expected = "in_features=40, out_features=24, bias=True, bits=3, data_type=nf, block_size=32"
    assert repr(layer) == f"LoftqLinear({expected})"


@pytest.mark.parametrize("levels", ["nf", "trellis"])
def test_torch_compile_traces_a_packed_layer(levels: str) -> None:
    layer, dense = packed_linear(24, 40, 2, torch.float32, levels=levels)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="aot_eager")
    x = torch.randn(3, 40, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, dense(x).relu())
    y.sum().backward()
    assert x.grad is not None


def test_what_can_be_packed() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.falcon.modeling_falcon import FalconLinear

    attention = nn.MultiheadAttention(8, 2)
    assert is_packable(nn.Linear(2, 2)) and is_packable(Conv1D(2, 2)) and is_packable(FalconLinear(2, 2))
    assert is_packable(nn.Embedding(3, 2)) and not is_packable(nn.LayerNorm(2))
    assert not is_packable(BartScaledWordEmbedding(3, 2, 0, embed_scale=2.0))
    assert not is_packable(nn.Embedding(3, 2, max_norm=1.0)) and not is_packable(attention.out_proj)
