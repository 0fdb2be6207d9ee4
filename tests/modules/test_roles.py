"""Roles of tensors, on tiny checkpoints that transformers itself wrote (so with each family's original names)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.families import FAMILIES
from support.family_checkpoints import save, saved
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq_cli.errors import LoftqError
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.modules.roles import ModuleMap, TensorRole, map_modules


def _by_tensor(found: ModuleMap) -> dict[str, TensorRole]:
    return {role.tensor: role for role in found.roles}


def _quantizable(found: ModuleMap) -> list[TensorRole]:
    return [role for role in found.roles if role.keep is None]


every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_every_tensor_has_a_role_that_fits_the_real_model(name: str) -> None:
    checkpoint = saved(name)
    model, config, shapes = checkpoint.model, checkpoint.config, checkpoint.shapes
    found = map_modules(config, shapes)

    assert [role.tensor for role in found.roles] == list(shapes)
    assert (found.architecture, found.notes, found.missing) == (type(model).__name__, (), ())
    assert not [role for role in found.roles if role.keep and role.keep.why is Why.UNKNOWN]
    for role in found.roles:
        if role.kind == "expert":
            check_expert(model, role, shapes[role.tensor])
        elif role.module is not None:
            module = model.get_submodule(role.module)
            assert tuple(module.weight.shape) == shapes[role.tensor]
            matrix = Conv1D if role.kind == "conv1d" else nn.Linear
            assert isinstance(module, matrix) == (role.kind in ("linear", "conv1d", "head"))
        if role.keep is None:
            dimensions = 3 if role.expert and role.expert.stacked else 2
            assert role.kind != "other" and role.module is not None and len(shapes[role.tensor]) == dimensions


def check_expert(model: nn.Module, role: TensorRole, shape: tuple[int, ...]) -> None:
    """The stacked parameter has room for exactly these matrices."""
    expert, parameter = role.expert, model.get_parameter(role.parameter)
    assert expert is not None and role.module == role.parameter
    assert len(parameter) == expert.count and expert.index < expert.count and expert.part < expert.parts
    assert tuple(parameter.shape) == (shape if expert.stacked else (expert.count, expert.parts * shape[0], shape[1]))


@every_family
def test_experts_are_numbered_as_transformers_stacks_them(name: str) -> None:
    checkpoint = saved(name)
    found = map_modules(checkpoint.config, checkpoint.shapes)
    places = [(role.parameter, role.expert.index, role.expert.part) for role in found.roles if role.expert]
    assert len(set(places)) == len(places)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    for role in found.roles:
        if role.expert and not role.expert.stacked:
            stacked = checkpoint.model.get_parameter(role.parameter)
            rows = slice(role.expert.part * len(tensors[role.tensor]), None)
            assert torch.equal(stacked[role.expert.index][rows][: len(tensors[role.tensor])], tensors[role.tensor])


@every_family
def test_linear_modules_are_the_models_own_and_only_ties_lack_a_tensor(name: str) -> None:
    checkpoint = saved(name)
    model, config, shapes = checkpoint.model, checkpoint.config, checkpoint.shapes
    found = map_modules(config, shapes)
    real = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert list(found.linear_modules) == real

    on_disk = {role.module for role in found.roles if role.kind in ("linear", "conv1d", "head")}
    assert set(real) - on_disk == {path for path in real if f"{path}.weight" in model.all_tied_weights_keys}


class Packed(nn.Linear):
    """A Linear that computes what the original does but whose `weight` nobody can use, as in a packed format. For a
    model that asks for it, its dtype is right."""

    def __init__(self, original: nn.Module, shape: tuple[int, int], dtype_read: bool) -> None:
        super().__init__(shape[1], shape[0], bias=False, device="meta")
        dtype = original.weight.dtype if dtype_read else torch.uint8
        self.weight = nn.Parameter(torch.zeros(shape[0], shape[1] // 8, dtype=dtype), requires_grad=False)
        self.original = [original]  # in a list, so that it is no submodule

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.original[0](states)


@every_family
def test_the_model_computes_the_same_with_all_quantizable_weights_packed(name: str) -> None:
    """Whatever reads a weight past its module would see zeros of another type and shape."""
    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    model = FAMILIES[name]()
    inputs = FAMILIES[name].dummy_inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        for role in _quantizable(map_modules(config, shapes)):
            if role.kind not in ("embedding", "expert"):
                rows, columns = shapes[role.tensor] if role.kind != "conv1d" else reversed(shapes[role.tensor])
                dtype_read = any(need.why is Why.DTYPE_READ for need in role.needs)
                packed = Packed(model.get_submodule(role.module), (rows, columns), dtype_read)
                model.set_submodule(role.module, packed)
        after = model(**inputs)[0]
    assert torch.equal(before, after)


@every_family
def test_peft_finds_every_module_path(name: str) -> None:
    peft = pytest.importorskip("peft")

    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    found = map_modules(config, shapes)
    plain = [role for role in _quantizable(found) if role.kind in ("linear", "conv1d")]
    wanted = {role.module for role in plain}
    lora = peft.LoraConfig(
        r=2,
        target_modules=sorted(role.module for role in plain if not role.parameter),
        target_parameters=sorted(role.parameter for role in plain if role.parameter) or None,
        task_type=found.task_type,
    )
    adapted = peft.get_peft_model(FAMILIES[name](), lora)
    names = {
        path.removesuffix(".lora_A.default") for path, _ in adapted.named_modules() if path.endswith("lora_A.default")
    }
    assert names == {f"base_model.model.{path}" for path in wanted}


def test_tied_embedding_and_head_keep_each_other() -> None:
    checkpoint = saved("llama_tied")
    config, shapes = checkpoint.config, checkpoint.shapes
    roles = _by_tensor(map_modules(config, shapes))
    assert "lm_head.weight" not in roles
    embedding = roles["model.embed_tokens.weight"]
    assert (embedding.kind, embedding.keep, embedding.tied) == ("embedding", None, "lm_head.weight")
    # Some checkpoints store both.
    both = _by_tensor(map_modules(config, shapes | {"lm_head.weight": (96, 64)}))
    assert both["lm_head.weight"].kind == "head"
    assert both["lm_head.weight"].keep == Reason(Why.TIED, "model.embed_tokens.weight")
    assert str(both["lm_head.weight"].keep) == "tied to model.embed_tokens.weight"


def test_untied_embedding_and_head_may_be_quantized() -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    found = map_modules(config, shapes)
    roles = _by_tensor(found)
    assert (roles["lm_head.weight"].kind, roles["lm_head.weight"].keep) == ("head", None)
    assert (roles["model.embed_tokens.weight"].kind, roles["model.embed_tokens.weight"].keep) == ("embedding", None)
    assert (found.task_type, found.base_model_prefix, found.model_type) == ("CAUSAL_LM", "model", "llama")


KEPT = {
    "t5": {
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": None,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position embedding",
        "shared.weight": None,
    },
    "mamba": {
        "backbone.layers.0.mixer.in_proj.weight": None,
        "backbone.layers.0.mixer.x_proj.weight": "its weight is read directly by MambaMixer",
        "backbone.layers.0.mixer.dt_proj.weight": "its weight is read directly by MambaMixer",
        "backbone.layers.0.mixer.out_proj.weight": "its weight is read directly by MambaMixer",
        "backbone.layers.0.mixer.conv1d.weight": "convolution",
        "backbone.layers.0.mixer.A_log": "not a matrix",
    },
    "bert_mlm": {
        "cls.predictions.transform.dense.weight": (
            "task head or other layer outside the base model (choose it with --include)"
        ),
        "bert.embeddings.word_embeddings.weight": None,
        "bert.embeddings.position_embeddings.weight": "position embedding",
        "bert.embeddings.token_type_embeddings.weight": "embedding",
        "bert.embeddings.LayerNorm.weight": "normalization",
        "bert.encoder.layer.0.attention.self.query.bias": "bias",
    },
    "bert_classifier": {"classifier.weight": "task head", "bert.pooler.dense.weight": None},
    "deberta_v2": {
        "deberta.encoder.rel_embeddings.weight": "position embedding",
        "deberta.encoder.conv.conv.weight": "convolution",
        "pooler.dense.weight": "task head or other layer outside the base model (choose it with --include)",
    },
    "vit": {
        "classifier.weight": "task head",
        "vit.embeddings.patch_embeddings.projection.weight": "convolution",
        "vit.encoder.layer.0.attention.attention.query.weight": None,
    },
    "mixtral": {
        "model.layers.0.block_sparse_moe.gate.weight": "router",
        "model.layers.0.block_sparse_moe.experts.3.w2.weight": None,
        "model.layers.0.self_attn.q_proj.weight": None,
    },
    "deepseek_v3": {
        "model.layers.1.mlp.gate.weight": "router",
        "model.layers.1.mlp.experts.0.up_proj.weight": None,
        "model.layers.1.mlp.shared_experts.up_proj.weight": None,
        "model.layers.0.mlp.up_proj.weight": None,
        "model.layers.0.self_attn.kv_b_proj.weight": None,
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj": None,
        "model.layers.0.mlp.experts.gate_up_proj_bias": "bias",
        "model.layers.0.mlp.router.weight": "router",
    },
}


@pytest.mark.parametrize(("name", "tensor"), [(name, tensor) for name, kept in KEPT.items() for tensor in kept])
def test_reasons(name: str, tensor: str) -> None:
    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    keep = _by_tensor(map_modules(config, shapes))[tensor].keep
    assert (keep and str(keep)) == KEPT[name][tensor]


NEEDS = {
    "t5": {
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": [
            "kept in float32 by transformers (_keep_in_fp32_modules)",
            "its weight's dtype is read by T5DenseGatedActDense",
        ],
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": [],
    },
    # The output head's values are used by the head alone.
    "mamba": {"lm_head.weight": ["its weight's dtype is read by MambaForCausalLM"]},
    "mixtral": {"model.layers.0.block_sparse_moe.gate.weight": []},
}


@pytest.mark.parametrize(("name", "tensor"), [(name, tensor) for name, needs in NEEDS.items() for tensor in needs])
def test_needs(name: str, tensor: str) -> None:
    """A layer with needs stays in full precision only in a container that does not meet them."""
    checkpoint = saved(name)
    shapes = checkpoint.shapes | ({"lm_head.weight": (96, 64)} if name == "mamba" else {})
    untied = {"tie_word_embeddings": False} if name == "mamba" else {}
    role = _by_tensor(map_modules(checkpoint.config | untied, shapes))[tensor]
    assert [str(need) for need in role.needs] == NEEDS[name][tensor]


@pytest.mark.parametrize(
    ("name", "tensor", "module", "tower"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn", "text"),
        ("vit", "vit.encoder.layer.1.output.dense.weight", "vit.layers.1.mlp.fc2", "text"),
        (
            "llava",
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj",
            "text",
        ),
        ("llava", "language_model.lm_head.weight", "lm_head", "text"),
        ("llava", "multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1", "other"),
        ("qwen2_vl", "visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv", "vision"),
        ("qwen2_vl", "model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj", "text"),
    ],
)
def test_names_on_disk_become_module_paths(name: str, tensor: str, module: str, tower: str) -> None:
    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    role = _by_tensor(map_modules(config, shapes))[tensor]
    assert (role.module, role.tower) == (module, tower)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_a_model_of_two_modalities_has_towers(name: str) -> None:
    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    roles = map_modules(config, shapes).roles
    assert {role.tower for role in roles} >= {"text", "vision"}
    assert all(role.tower == "text" for role in roles if role.kind in ("head", "embedding"))


@pytest.mark.parametrize(
    ("name", "task"),
    [("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"), ("whisper", None), ("bert_mlm", None)],
)
def test_task_type(name: str, task: str | None) -> None:
    checkpoint = saved(name)
    config, shapes = checkpoint.config, checkpoint.shapes
    assert map_modules(config, shapes).task_type == task


def test_base_model_weights_under_a_class_with_a_head() -> None:
    checkpoint = saved("bert")
    config, shapes = checkpoint.config, checkpoint.shapes
    found = map_modules(config | {"architectures": ["BertForMaskedLM"]}, shapes)
    role = _by_tensor(found)["encoder.layer.0.attention.self.query.weight"]
    assert (role.module, role.keep) == ("bert.encoder.layer.0.attention.self.query", None)
    assert found.missing == ("cls.predictions.transform.dense.weight",)
    # BertForMaskedLM has no pooler: transformers would ignore it.
    keep = _by_tensor(found)["pooler.dense.weight"].keep
    assert str(keep) == "not part of BertForMaskedLM (ignored by transformers)"


def test_old_names_of_the_hub() -> None:
    checkpoint = saved("gpt2")
    config, shapes = checkpoint.config, checkpoint.shapes
    bare = {tensor.removeprefix("transformer."): shape for tensor, shape in shapes.items()}
    assert _by_tensor(map_modules(config, bare))["h.0.mlp.c_fc.weight"].module == "transformer.h.0.mlp.c_fc"

    checkpoint = saved("bert_classifier")
    config, shapes = checkpoint.config, checkpoint.shapes
    old = {tensor.replace("LayerNorm.weight", "LayerNorm.gamma"): shape for tensor, shape in shapes.items()}
    assert str(_by_tensor(map_modules(config, old))["bert.embeddings.LayerNorm.gamma"].keep) == "normalization"


def test_unknown_tensors_are_kept_and_counted() -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    found = map_modules(config, {"extra.weight": (64, 64), **shapes})
    assert found.roles[0] == TensorRole("extra.weight", None, "other", Reason(Why.UNKNOWN, "LlamaForCausalLM"))
    assert str(found.roles[0].keep) == "not part of LlamaForCausalLM (ignored by transformers)"
    assert found.notes == ("1 tensor is not part of LlamaForCausalLM, so transformers ignores: extra.weight",)


def test_a_shape_that_contradicts_the_config_is_refused() -> None:
    checkpoint = saved("llama")
    config, shapes = checkpoint.config, checkpoint.shapes
    with pytest.raises(LoftqError, match=r"k_proj.weight has shape \[32, 64\] on disk but .* expects \[64, 64\]"):
        map_modules(config | {"head_dim": 32}, shapes)


def test_missing_names_what_the_checkpoint_lacks() -> None:
    checkpoint = saved("mixtral")
    config, shapes = checkpoint.config, checkpoint.shapes
    rest = {tensor: shape for tensor, shape in shapes.items() if "layers.1.block_sparse_moe.experts" not in tensor}
    experts = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    assert map_modules(config, rest).missing == experts


def test_a_matrix_that_transformers_splits_is_kept(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.NomicBertModel(transformers.NomicBertConfig(vocab_size=96, **sizes))
    checkpoint = save(model, tmp_path)
    shapes = checkpoint.shapes
    found = map_modules(checkpoint.config, shapes)
    [fused] = [role for role in found.roles if "split" in str(role.keep or "") and len(shapes[role.tensor]) == 2]
    assert (fused.module, fused.kind, shapes[fused.tensor]) == (None, "other", (192, 64))
    assert found.missing == () and "layers.0.self_attn.q_proj" in found.linear_modules
