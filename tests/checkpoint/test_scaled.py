"""FP8 and MXFP4 sources: exactly what transformers dequantizes; converted as the bfloat16 model would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint import open_checkpoint
from loftq_cli.checkpoint.scaled import dequantize_fp8, dequantize_mxfp4
from loftq_cli.errors import LoftqError

FP8 = torch.float8_e4m3fn


def random_fp8(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul(100).to(FP8)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((256, 384), (2, 3)), ((64, 96), (1, 1)), ((3, 128, 64), (3, 2, 1)), ((48, 64), (1, 2)), ((4, 32), (1, 1))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_fp8_is_what_transformers_dequantizes(shape: tuple, grid: tuple, dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    values = random_fp8(*shape)
    scales = torch.rand(grid).mul(3).to(dtype) if dtype.is_floating_point else torch.randint(110, 130, grid).to(dtype)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=torch.bfloat16)
    for block in (None, (128, 128)):
        assert torch.equal(dequantize_fp8(values, scales, block), expected)


def test_fp8_with_cut_blocks_and_other_scales() -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128; compressed-tensors and fbgemm scale rows; both by hand."""
    torch.manual_seed(0)
    values = random_fp8(576, 192)
    scales = torch.rand(5, 2)
    expected = torch.empty(576, 192)
    for row in range(576):
        for column in (0, 128):
            stop = min(column + 128, 192)
            expected[row, column:stop] = values[row, column:stop].float() * scales[row // 128, column // 128]
    assert torch.equal(dequantize_fp8(values, scales, (128, 128)), expected.bfloat16())
    rows = torch.rand(576)
    for grid in (rows, rows[:, None]):
        assert torch.equal(dequantize_fp8(values, grid), (values.float() * rows[:, None]).bfloat16())
    experts, columns = random_fp8(3, 8, 16), torch.rand(3, 1, 16)
    assert torch.equal(dequantize_fp8(experts, columns), (experts.float() * columns).bfloat16())
    one = torch.rand(3)
    assert torch.equal(dequantize_fp8(experts, one), (experts.float() * one[:, None, None]).bfloat16())
    with pytest.raises(ValueError, match="do not fit"):
        dequantize_fp8(values, torch.rand(7, 2))


def test_mxfp4_is_what_transformers_dequantizes() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 2, 16)).to(torch.uint8)
    scales = torch.randint(0, 255, (3, 40, 2)).to(torch.uint8)
    assert torch.equal(dequantize_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def quantized_copy(source: Path, target: Path, suffix: str, quantization: dict) -> dict[str, torch.Tensor]:
    """A tiny Llama whose linear weights are FP8 in blocks of 32; what they stand for comes back."""
    target.mkdir()
    stored, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "proj" not in name or tensor.shape[0] % 32:
            stored[name] = meant[name] = tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        tiles = tensor.reshape(rows // 32, 32, columns // 32, 32)
        scales = tiles.abs().amax((1, 3)) / 448
        stored[name] = (tiles / scales[:, None, :, None]).to(FP8).reshape(rows, columns)
        stored[name + suffix] = scales
        meant[name] = dequantize_fp8(stored[name], scales, (32, 32))
    stored["model.layers.0.self_attn.k_proj.input_scale"] = torch.ones(1)
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return meant


BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def test_fp8_model_reads_as_transformers_loads_it(random_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    meant = quantized_copy(random_llama, tmp_path / "fp8", "_scale_inv", BLOCKS)
    checkpoint = open_checkpoint(tmp_path / "fp8")
    assert "quantization_config" not in checkpoint.config and set(checkpoint.tensors) == set(meant)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    loaded = model.state_dict()
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape) == (torch.bfloat16, meant[name].shape)
        assert torch.equal(tensor, meant[name]) and torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize(
    ("suffix", "quantization"),
    [("_scale_inv", BLOCKS), ("_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"})],
)
def test_fp8_model_converts_as_its_bfloat16_twin(
    suffix: str, quantization: dict, random_llama: Path, tmp_path: Path
) -> None:
    meant = quantized_copy(random_llama, tmp_path / "fp8", suffix, quantization)
    (tmp_path / "twin").mkdir()
    save_file(meant, tmp_path / "twin" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "twin" / "config.json").write_text(json.dumps(config))
    for name in ("fp8", "twin"):
        loftq_cli.quantize(tmp_path / name, output=tmp_path / f"{name}-out", bits=2, rank=8, iters=2)
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        one, other = load_file(tmp_path / "fp8-out" / file), load_file(tmp_path / "twin-out" / file)
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_mxfp4_experts_read_as_bfloat16(tmp_path: Path) -> None:
    from support.families import FAMILIES
    from transformers import AutoModelForCausalLM

    model = FAMILIES["gpt_oss"]()
    stored = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16)).to(torch.uint8)
        stored[f"{name}_scales"] = torch.randint(110, 125, (experts, rows, columns // 32)).to(torch.uint8)
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(loaded)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == info.shape and torch.equal(tensor, loaded[name]), name
        assert torch.equal(checkpoint.read_piece(name, -1 + len(tensor)), tensor[-1]), name
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({name: checkpoint.read(name) for name in checkpoint.tensors}, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    for source, out in ((tmp_path, tmp_path.parent / "mx-out"), (whole, tmp_path.parent / "whole-out")):
        manifest = loftq_cli.quantize(source, output=out, bits=2, rank=4, iters=2)
        assert sum(record.kind == "expert" for record in manifest.matrices) == 16
    assert _contents(tmp_path.parent / "mx-out") == _contents(tmp_path.parent / "whole-out")


def _contents(out: Path) -> dict[str, bytes]:
    files = ("model.safetensors", "loftq_init/adapter_model.safetensors")
    return {f"{file} {name}": bytes(tensor.view(torch.uint8).numpy()) for file in files
            for name, tensor in load_file(out / file).items()}  # fmt: skip


def test_fp8_experts_convert_as_their_bfloat16_twins(tmp_path: Path) -> None:
    """DeepSeek-V3 stores experts one by one, each with its own blocks of scales."""
    from support.family_checkpoints import saved

    meant = quantized_copy(saved("deepseek_v3").folder, tmp_path / "fp8", "_scale_inv", BLOCKS)
    (tmp_path / "twin").mkdir()
    save_file(meant, tmp_path / "twin" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "twin" / "config.json").write_text(json.dumps(config))
    for name in ("fp8", "twin"):
        manifest = loftq_cli.quantize(tmp_path / name, output=tmp_path / f"{name}-out", bits=2, rank=8, iters=2)
        assert sum(record.kind == "expert" for record in manifest.matrices) == 12
    assert _contents(tmp_path / "fp8-out") == _contents(tmp_path / "twin-out")


@pytest.mark.parametrize("grid", [(4, 2, 3), (4, 1, 1), (4,), (1,), (4, 64, 1), (1, 2, 3)])
def test_one_expert_of_an_fp8_stack_is_read_alone(grid: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = {"experts.w": random_fp8(4, 64, 96), "experts.w_scale": torch.rand(grid)}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    checkpoint = open_checkpoint(tmp_path)
    whole = checkpoint.read("experts.w")
    assert all(torch.equal(checkpoint.read_piece("experts.w", i), whole[i]) for i in range(4))


REFUSED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "torchao": {"quant_method": "torchao"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "unknown method": {},
}


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_other_quantized_sources_are_refused(method: str, nested: bool, random_llama: Path, tmp_path: Path) -> None:
    meant = load_file(random_llama / "model.safetensors")
    save_file(meant, tmp_path / "model.safetensors")
    config = json.loads((random_llama / "config.json").read_text())
    entry = {"quantization_config": REFUSED[method]}
    config |= {"_name_or_path": "org/full", **({"text_config": entry} if nested else entry)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoftqError, match=rf"already quantized \({method}\): .* perhaps org/full"):
        loftq_cli.plan(tmp_path)


def test_fp8_beside_something_else_is_refused(random_llama: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    quantized_copy(random_llama, tmp_path / "mixed", "_scale", quantization)
    stored = load_file(tmp_path / "mixed" / "model.safetensors")
    for change in (
        {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(160, 64, dtype=torch.int8)},
    ):
        save_file({**stored, **change}, tmp_path / "mixed" / "model.safetensors")
        with pytest.raises(LoftqError, match=r"already quantized \(compressed-tensors\)"):
            loftq_cli.plan(tmp_path / "mixed")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({**stored, name: torch.ones(7, 2)}, tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(LoftqError, match=r"up_proj\.weight in model\.safetensors cannot be dequantized"):
        loftq_cli.plan(tmp_path / "mixed")


def test_packed_names_give_away_a_quantized_source(random_llama: Path, tmp_path: Path) -> None:
    stored = load_file(random_llama / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    stored[f"{name}.qweight"] = torch.zeros(8, 64, dtype=torch.int32)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((random_llama / "config.json").read_bytes())
    with pytest.raises(LoftqError, match="already quantized"):
        loftq_cli.plan(tmp_path)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [out, in] -> int32 [out, words], the first code in the lowest bits; written by hand, not with loftq."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word) * bits
    words = (padded.unflatten(1, (-1, per_word)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["group", "channel", "asymmetric", "actorder", "padded"])
def test_packed_integers_are_dequantized(bits: int, kind: str, random_llama: Path, tmp_path: Path) -> None:
    """compressed-tensors' pack-quantized: every weight is (code - zero) times its group's scale."""
    torch.manual_seed(0)
    name, rows, columns = "model.layers.0.mlp.up_proj", 6, 44 if kind == "padded" else 64
    size = columns if kind == "channel" else 22 if kind == "padded" else 32
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, columns // size).bfloat16()
    zeros = torch.randint(-half, half, (rows, columns // size), dtype=torch.int8)
    group = torch.arange(columns) // size
    stored = {f"{name}.weight_packed": pack_words(codes, bits), f"{name}.weight_scale": scales}
    stored[f"{name}.weight_shape"] = torch.tensor([rows, columns])
    if kind == "asymmetric":
        stored[f"{name}.weight_zero_point"] = pack_words(zeros.T.contiguous(), bits).T.contiguous()
    if kind == "actorder":
        group = group[torch.randperm(columns)]
        stored[f"{name}.weight_g_idx"] = group.int()
    weights = {"num_bits": bits, "type": "int", "symmetric": kind != "asymmetric", "strategy": "group"}
    weights |= {"strategy": "channel"} if kind == "channel" else {"group_size": size}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    quantization["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": quantization}}))
    save_file(stored, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    shift = zeros.float() if kind == "asymmetric" else torch.zeros_like(zeros, dtype=torch.float32)
    expected = ((codes.float() - shift[:, group]) * scales.float()[:, group]).bfloat16()
    info = opened.tensors[f"{name}.weight"]
    assert set(opened.tensors) == {info.name} and (info.shape, info.dtype) == ((rows, columns), torch.bfloat16)
    assert torch.equal(opened.read(info.name), expected)
    assert torch.equal(opened.read_piece(info.name, 3), expected[3])
    stored[f"{name}.weight_shape"] = torch.tensor([rows, columns + 1])
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(LoftqError, match=rf"{name}\.weight_shape in model\.safetensors is .*: download it again"):
        open_checkpoint(tmp_path).read(info.name)
    stored[f"{name}.weight_scale"] = torch.rand(rows + 1, 3).bfloat16()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(LoftqError, match=rf"{name}\.weight_packed in model\.safetensors cannot be dequantized"):
        open_checkpoint(tmp_path)


def test_mlx_and_modelopt_are_named(random_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    stored = load_file(random_llama / "model.safetensors")
    config = json.loads((random_llama / "config.json").read_text())
    settings = {"group_size": 64, "bits": 4}
    for extra in ({"quantization": settings}, {"quantization": settings, "quantization_config": settings}):
        (tmp_path / "config.json").write_text(json.dumps(config | extra))
        save_file({**stored, f"{name}.scales": torch.ones(160, 1)}, tmp_path / "model.safetensors")
        with pytest.raises(LoftqError, match=r"already quantized \(MLX, 4 bits\): give the full-precision model"):
            loftq_cli.plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    halved = torch.zeros(160, 32, dtype=torch.uint8)
    scales = {
        f"{name}.weight": halved,
        f"{name}.weight_scale": torch.ones(160, 4),
        f"{name}.weight_scale_2": torch.ones(1),
    }
    save_file({**stored, **scales}, tmp_path / "model.safetensors")
    with pytest.raises(LoftqError, match=r"already quantized \(modelopt, NVFP4\): give the full-precision model"):
        loftq_cli.plan(tmp_path)
