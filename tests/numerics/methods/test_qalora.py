"""QA-LoRA: the pooled adapter that PEFT trains, its start, and its update of the weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.artifacts.decode import decode_matrix, decode_product
from loftq_cli.errors import UsageError
from loftq_cli.numerics.lowrank.truncate import exact_low_rank
from loftq_cli.numerics.methods.qalora import PooledStep, group_means
from loftq_cli.runtime.pooled import PooledLora

GROUP = 32


@pytest.fixture(scope="module")
def converted(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama at 2 bits in packed, with an adapter whose alpha differs from its rank."""
    out = tmp_path_factory.mktemp("qalora") / "out"
    loftq_cli.quantize(
        random_llama, output=out, bits=2, method="qa-lora", group_size=GROUP, rank=2, alpha=6.0, iters=2, scale="minmax"
    )
    return out


def test_the_step_is_the_best_pooled_update() -> None:
    residual = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    found = PooledStep(5, GROUP, torch.Generator().manual_seed(1))(residual, None)
    product = found.lora_b @ found.lora_a
    assert torch.equal(product.unflatten(1, (-1, GROUP)).std(-1), torch.zeros(96, 256 // GROUP)), "constant in groups"
    means = group_means(residual, GROUP)
    best = exact_low_rank(means, 5)
    expected = (best.u * best.s @ best.v.T).repeat_interleave(GROUP, dim=1)
    assert torch.allclose(product, expected, atol=1e-5)
    left = residual.norm() ** 2 - found.s.square().sum()
    assert float(left) == pytest.approx(float((residual - product).norm() ** 2), rel=1e-5)
    assert torch.allclose(found.v.T @ found.v, torch.eye(5), atol=1e-5)


def test_files_are_pefts_own(converted: Path) -> None:
    import json

    config = json.loads((converted / "loftq_init" / "adapter_config.json").read_text())
    assert config["use_qalora"] is True and config["qalora_group_size"] == GROUP and config["lora_alpha"] == 6
    tensors = load_file(converted / "loftq_init" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 160 // GROUP)
    assert loftq_cli.read_manifest(converted).recipe["data_type"] == "int"


def test_the_recorded_residual_is_that_of_the_files(converted: Path, random_llama: Path) -> None:
    weights = load_file(random_llama / "model.safetensors")
    manifest = loftq_cli.read_manifest(converted)
    for record in manifest.matrices:
        w = weights[record.tensor]
        left = w - decode_matrix(converted, manifest, record) - decode_product(converted, manifest, record)
        assert float(left.norm() / w.norm()) == pytest.approx(record.residual, rel=1e-4)
        assert record.residual < record.plain_residual


def test_verify_recomputes_the_residuals(converted: Path, random_llama: Path) -> None:
    found = loftq_cli.verify(converted, source=random_llama)
    assert not found.problems and found.matrices == 14 and found.largest_deviation < 1e-4


def test_it_trains_saves_and_loads(converted: Path, tmp_path: Path) -> None:
    model = loftq_cli.load(converted, trainable=True)
    manifest = loftq_cli.read_manifest(converted)
    for record in manifest.matrices:
        layer = model.base_model.model.get_submodule(record.module)
        assert isinstance(layer, PooledLora)
        assert torch.allclose(layer.get_delta_weight("default"), decode_product(converted, manifest, record), atol=1e-6)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and float(grad.abs().max()) > 0 for grad in grads)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path / "trained")
    again = loftq_cli.load(converted, adapter=tmp_path / "trained")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_logits_and_gradients_are_those_of_the_dense_twin(converted: Path) -> None:
    """The twin is the same adapter as a dense matrix on a dequantized backbone."""
    model = loftq_cli.load(converted, trainable=True).eval()
    ids = torch.arange(16).reshape(1, 16)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    name = "base_model.model.model.layers.1.mlp.up_proj"
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    twin = loftq_cli.load(converted, adapter=False)
    twin.dequantize()
    manifest = loftq_cli.read_manifest(converted)
    for record in manifest.matrices:
        weight = twin.get_submodule(record.module).weight
        weight.data += decode_product(converted, manifest, record)
    dense_loss = twin(input_ids=ids, labels=ids).loss
    dense_loss.backward()
    assert loss.item() == pytest.approx(dense_loss.item(), abs=1e-6)
    layer = model.get_submodule(name)
    full = twin.get_submodule("model.layers.1.mlp.up_proj").weight.grad
    constant = 3.0 * (64 / GROUP) / GROUP
    pooled = full.unflatten(1, (-1, GROUP)).sum(-1) * constant  # dL/dC, through C = c · BA
    assert torch.allclose(grads[f"{name}.lora_A.default.weight"], layer.lora_B["default"].weight.T @ pooled, atol=1e-5)
    assert torch.allclose(grads[f"{name}.lora_B.default.weight"], pooled @ layer.lora_A["default"].weight.T, atol=1e-5)


def test_a_dense_backbone_merges_in_peft(random_llama: Path, tmp_path: Path) -> None:
    loftq_cli.quantize(
        random_llama, output=tmp_path / "out", bits=2, method="qa-lora", group_size=GROUP, rank=2, format="dense"
    )
    model = loftq_cli.load(tmp_path / "out").eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        after = model.merge_and_unload()(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


def test_zero_start(random_llama: Path, tmp_path: Path) -> None:
    made = loftq_cli.quantize(
        random_llama, output=tmp_path / "out", bits=4, method="qa-lora", group_size=GROUP, init="zero"
    )
    assert all(record.best == 0 and record.residual == record.plain_residual for record in made.matrices)
    tensors = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    assert all(torch.count_nonzero(t) == 0 for n, t in tensors.items() if "lora_B" in n)
    assert all(torch.count_nonzero(t) == t.numel() for n, t in tensors.items() if "lora_A" in n)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"group_size": 128}, "not a multiple of the group size 128"),
        ({"group_size": -1}, "--group-size 32"),
        ({"data_type": "nf"}, "asymmetric integers"),
        ({"symmetric": True}, "asymmetric integers"),
        ({"format": "bnb"}, "packed"),
        ({"embeddings": "adapt"}, "--embeddings keep"),
    ],
)
def test_impossible_recipes_are_refused(recipe: dict, said: str, random_llama: Path) -> None:
    with pytest.raises(UsageError, match=said):
        loftq_cli.plan(random_llama, bits=2, method="qa-lora", **recipe)


def test_gptq_backbone_trains_through_pefts_own_layer(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's `GPTQLoraLinear` with `use_qalora`, loaded by PEFT itself, without any of our code."""
    pytest.importorskip("gptqmodel", reason="gptqmodel, which reads GPTQ checkpoints, is not installed")
    pytest.importorskip("optimum", reason="optimum, through which transformers reads GPTQ checkpoints, is missing")
    from peft import PeftModel
    from peft.tuners.lora.gptq import GPTQLoraLinear
    from transformers import AutoModelForCausalLM, GPTQConfig

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # otherwise its kernels would be compiled
    out = tmp_path / "out"
    recipe = {"bits": 4, "method": "qa-lora", "group_size": GROUP, "rank": 2, "alpha": 6.0, "iters": 2}
    manifest = loftq_cli.quantize(random_llama, output=out, format="gptq-v2", **recipe)
    backbone = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=GPTQConfig(bits=4, backend="auto_trainable"), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(backbone, out, subfolder="loftq_init", is_trainable=True)
    record = manifest.matrices[0]
    layer = model.base_model.model.get_submodule(record.module)
    assert isinstance(layer, GPTQLoraLinear) and record.residual < record.plain_residual
    x = torch.randn(3, record.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
    assert torch.allclose(added, x @ decode_product(out, manifest, record).T, atol=1e-5)
    ids = torch.arange(16).reshape(1, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    ours = loftq_cli.load(out).base_model.model.get_submodule(record.module)
    assert isinstance(ours, GPTQLoraLinear), "our loader must leave these layers to PEFT"
