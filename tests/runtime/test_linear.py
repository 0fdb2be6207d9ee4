"""Packed layers and the transformers plugin: every number equals the dense twin's, bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import handmade
from support.handmade import logits
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from loftq_cli.errors import LoftqError
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPES, GridRequest, QuantizedMatrix
from loftq_cli.numerics.grids.blocks import BlockGrid, quantize
from loftq_cli.runtime import LoftqConfig, LoftqEmbedding, LoftqLinear, is_packable, register
from loftq_cli.runtime import decode as decode_module
from loftq_cli.runtime.codes import PackedCodes

SHAPES = ((8, 128), (7, 100), (5, 33), (3, 1))
BITS = (2, 3, 4, 8)


def encoded(shape: tuple[int, int], bits: int, dtype: torch.dtype, kind: str = "linear", block_size: int = 32):
    """A random matrix in packed storage: grid, codes, scales, and Q as the format decodes it."""
    packed = get_format("packed")
    grid = packed.grid(GridRequest(kind, *shape, bits, "nf", block_size, dtype))
    matrix = QuantizedMatrix("m.weight", "m", kind, *shape, grid)
    tensors = packed.encode(matrix, quantize(torch.randn(shape), grid))
    return grid, tensors["m.weight"], tensors["m.weight_absmax"], packed.decode(matrix, tensors.__getitem__).to(dtype)


def fill(layer: nn.Module, codes: Tensor, absmax: Tensor) -> None:
    layer.load_state_dict({"weight": codes, "weight_absmax": absmax}, strict=False)


def packed_linear(n_out: int, n_in: int, bits: int, dtype: torch.dtype, *, bias: bool = True):
    """A packed layer and the dense layer it must equal."""
    torch.manual_seed(0)
    grid, codes, absmax, q = encoded((n_out, n_in), bits, dtype)
    layer = LoftqLinear(n_in, n_out, bias, grid, dtype=dtype)
    fill(layer, codes, absmax)
    dense = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    dense.weight = nn.Parameter(q, requires_grad=False)
    if bias:
        layer.bias.data = dense.bias.data.clone()
    return layer, dense


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dequantized_weights_are_what_the_format_decodes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, bits, step in itertools.product(SHAPES, BITS, (200, 2**22)):
        monkeypatch.setattr(decode_module, "_STEP_CPU", step)
        grid, codes, absmax, q = encoded(shape, bits, dtype)
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
    for bits, bias in itertools.product(BITS, (True, False)):
        layer, dense = packed_linear(24, 40, bits, dtype, bias=bias)
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
    for bits, dtype in itertools.product(BITS, DTYPES.values()):
        grid, codes, absmax, q = encoded((50, 33), bits, dtype, "embedding")
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


def test_torch_compile_traces_a_packed_layer() -> None:
    layer, dense = packed_linear(24, 40, 2, torch.float32)
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


# --- through from_pretrained -------------------------------------------------------------------------------------


def mixed_bits(index: int) -> int:
    return BITS[index % 4]


def without_fp32_modules(path: str, module: nn.Module) -> bool:
    """T5 keeps `wo` in float32 and casts to its dtype; the planner never converts such modules."""
    return handmade.every_linear(path, module) and not path.endswith("wo")


FAMILIES = {
    "llama": (handmade.tiny_llama, AutoModelForCausalLM, handmade.every_linear),
    "gpt2": (handmade.tiny_gpt2, AutoModelForCausalLM, handmade.every_linear),
    "bert": (handmade.tiny_bert, AutoModelForMaskedLM, handmade.every_linear),
    "t5": (handmade.tiny_t5, AutoModelForSeq2SeqLM, without_fp32_modules),
    "embeddings": (handmade.tiny_llama, AutoModelForCausalLM, handmade.with_embeddings),
    "tied embeddings": (handmade.tiny_gpt2, AutoModelForCausalLM, handmade.with_embeddings),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loads_runs_saves_and_dequantizes_exactly(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build, auto_class, pick = FAMILIES[family]
    made = handmade.write(build(), tmp_path / "out", bits=mixed_bits, dtype=dtype, pick=pick)
    model, info = auto_class.from_pretrained(made.folder, output_loading_info=True)
    assert not any(info.values())
    packed = {
        path: module for path, module in model.named_modules() if isinstance(module, (LoftqLinear, LoftqEmbedding))
    }
    assert set(made.modules) <= set(packed)
    for matrix in made.matrices:
        q = get_format("packed").decode(matrix, made.tensors.__getitem__)
        assert torch.equal(packed[matrix.module].dequantized_weight().float(), q)
    expected = logits(made.twin)
    assert torch.equal(logits(model), expected)

    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == made.tensors.keys()
    for name, tensor in again.items():
        assert tensor.dtype == made.tensors[name].dtype and torch.equal(tensor, made.tensors[name])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made.folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    ties = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.dequantize()
    assert not any(isinstance(module, (LoftqLinear, LoftqEmbedding)) for module in model.modules())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == ties
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(auto_class.from_pretrained(tmp_path / "dense")), expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> handmade.Handmade:
    folder = tmp_path_factory.mktemp("llama") / "out"
    return handmade.write(handmade.tiny_llama(), folder, bits=mixed_bits, n_shards=3)


def test_the_dtype_asked_for_does_not_change_the_stored_values(llama: handmade.Handmade) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for matrix in llama.matrices:
        module = model.get_submodule(matrix.module)
        assert module.weight_absmax.dtype == torch.float32
        q = get_format("packed").decode(matrix, llama.tensors.__getitem__)
        assert torch.equal(module.dequantized_weight(), q)
    twin = type(llama.twin).from_pretrained(f"{llama.folder}-twin", dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(twin))


PLACES = {
    "one device": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "4GiB"}},
    "disk": {"device_map": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
                            "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_device_maps(place: str, llama: handmade.Handmade, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder, offload_folder=str(tmp_path), **PLACES[place])
    if place == "disk":
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), logits(llama.twin))
    assert torch.equal(logits(model), logits(llama.twin)), "a second pass reads offloaded codes again"
    model.dequantize()
    assert torch.equal(logits(model), logits(llama.twin))


def test_a_sharded_round_trip(llama: handmade.Handmade, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    again = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert again.keys() == llama.tensors.keys()
    assert all(torch.equal(again[name], llama.tensors[name]) for name in again)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama.twin))


def test_another_class_of_the_family_finds_its_modules(llama: handmade.Handmade, tmp_path: Path) -> None:
    model, info = AutoModel.from_pretrained(llama.folder, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model.layers[1].mlp.up_proj, LoftqLinear)
    assert torch.equal(logits(model), logits(llama.twin.model))
    bare = handmade.write(handmade.tiny_llama(cls="LlamaModel"), tmp_path / "bare")
    assert "layers.0.mlp.up_proj" in bare.modules
    with_head = AutoModelForCausalLM.from_pretrained(bare.folder)
    assert torch.equal(logits(with_head.model), logits(bare.twin))


def test_models_copy_and_cast_as_a_whole(llama: handmade.Handmade) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    expected = logits(llama.twin)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(logits(other), expected) for other in copies)
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_absmax.dtype == torch.float32
    model.to(torch.float32)
    assert all(torch.equal(model.get_submodule(path).weight_absmax, copies[0].get_submodule(path).weight_absmax)
               for path in llama.modules)  # fmt: skip


def test_tied_tables_share_codes_and_scales(tmp_path: Path) -> None:
    made = handmade.write(handmade.tiny_llama(tied=True), tmp_path / "out", pick=handmade.with_embeddings)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    head, table = model.lm_head, model.model.embed_tokens
    assert head.weight is table.weight and head.stored()[1] is table.weight_absmax
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.lm_head.stored()[1] is other.model.embed_tokens.weight_absmax
    assert torch.equal(logits(other), logits(made.twin))


def test_registering_again_is_harmless() -> None:
    register()
    register()


def config_of(**changes: object) -> dict:
    grid = encoded((8, 32), 2, torch.float32)[0]
    matrix = QuantizedMatrix("m.weight", "m", "linear", 8, 32, grid)
    return get_format("packed").quantization_config([matrix], [], torch.bfloat16) | changes


def test_config_round_trips_with_fields_it_does_not_know() -> None:
    written = config_of(remark="kept")
    config = LoftqConfig.from_dict(written)
    assert config.to_dict() == written
    (group,) = config.packed_groups()
    assert group.modules == ("m",) and group.grid.value_dtype == torch.bfloat16
    assert group.grid.codebook == encoded((8, 32), 2, torch.float32)[0].codebook


def test_configs_that_cannot_be_read_say_so() -> None:
    with pytest.raises(LoftqError, match=r"layout version 99 .*pip install -U loftq-cli"):
        LoftqConfig.from_dict(config_of(version=99))
    group = config_of()["groups"][0]
    for damage in ({"levels": [0.0, 1.0]}, {"scale_dtype": "int7"}, {"bits": "two"}):
        with pytest.raises(LoftqError, match="damaged"):
            LoftqConfig.from_dict(config_of(groups=[group | damage]))
    with pytest.raises(LoftqError, match="damaged"):
        LoftqConfig.from_dict(config_of(groups=[{}]))


def test_checkpoints_that_do_not_fit_the_class_say_so(llama: handmade.Handmade) -> None:
    config = AutoConfig.from_pretrained(llama.folder)
    groups = config.quantization_config["groups"]
    for group in groups:
        group["modules"] = [f"elsewhere.{path}" for path in group["modules"]]
    with pytest.raises(LoftqError, match="none of the packed modules"):
        AutoModelForCausalLM.from_pretrained(llama.folder, config=config)
    groups[0]["modules"] = ["model.norm"]
    with pytest.raises(LoftqError, match=r"'model\.norm' is a LlamaRMSNorm.*--rule"):
        AutoModelForCausalLM.from_pretrained(llama.folder, config=config)
