"""Find the role of every tensor of a checkpoint: its kind, its module, and the reason to keep it as it is, if any.

There is no table of architectures. The class that config.json names is built on the meta device; its modules show what
is a Linear, and transformers' conversion mapping shows how a name on disk becomes a module path. The model also shows
what must stay in full precision: ties, float32 lists, routers, weights that other code reads (`keep_rules`). Without
a model class, only names and shapes are available (`_map_by_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LoftqError
from loftq_cli.machine.json_record import json_record
from loftq_cli.modules import keep_rules as rules
from loftq_cli.modules.build import Built, build_on_meta, named_class
from loftq_cli.modules.classify import Kind, classify, expert_reason, is_router, layer_needs
from loftq_cli.modules.experts import Expert, find_expert, is_expert
from loftq_cli.modules.keep_rules import Tower
from loftq_cli.modules.names import RuntimeName, runtime_names
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.modules.view import ModelView, float32_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@json_record
@dataclass(frozen=True)
class TensorRole:
    """Role of one tensor of the checkpoint.

    Attributes:
        tensor: name on disk, e.g. "bert.encoder.layer.0.attention.self.query.weight".
        module: path of the module in the transformers-5 model whose `weight` this is, which PEFT targets; for an
            expert's matrix, the path of the parameter; None for biases, other bare parameters and tensors that
            transformers ignores.
        kind: "linear" is an nn.Linear stored [out, in]; "conv1d" a transformers Conv1D stored [in, out]; "head" the
            output embedding; "embedding" the input embedding table [vocabulary, width]; "expert" a matrix of a mixture
            of experts, or all of them in a 3-D tensor; "other" everything else.
        keep: the reason why this tensor must stay in full precision whatever the user asks for; None if it may be
            quantized.
        tower: the part of a multimodal model that it belongs to; always "text" in a model of one modality.
        parameter: the parameter that PEFT must adapt instead of the module; "" for none.
        expert: the place of an expert's matrix; for a 3-D tensor, that of its first matrix.
        tied: for an embedding table that may still be quantized, the parameter that shares it; "" for none.
        optional: `keep` is only the default; --include can choose the tensor all the same.
        float32: the dtypes, by name, for which transformers keeps this tensor in float32 when it loads the model.
        needs: what the running model asks of the loaded layer besides its forward, each as the reason to keep the
            tensor in a container that does not meet it (`formats.container.Container.unmet`).
    """

    tensor: str
    module: str | None
    kind: Kind
    keep: Reason | None
    tower: Tower = "text"
    parameter: str = ""
    expert: Expert | None = None
    tied: str = ""
    optional: bool = False
    float32: tuple[str, ...] = ()
    needs: tuple[Reason, ...] = ()


@json_record
@dataclass(frozen=True)
class ModuleMap:
    """The whole checkpoint.

    Attributes:
        architecture: the class that was built, e.g. "LlamaForCausalLM"; None if names and shapes were used instead.
        model_type: `model_type` of config.json.
        task_type: PEFT's "CAUSAL_LM" or "SEQ_2_SEQ_LM"; None otherwise, since PEFT would add heads or rename inputs.
        base_model_prefix: attribute of the base model inside the class, "" if unknown.
        roles: one per tensor of the checkpoint, in the order given.
        missing: parameters of at least two dimensions that the model has and the checkpoint lacks, without tied ones.
        notes: sentences for the user.
        linear_modules: every module that a quantizer or PEFT would treat as a Linear, with or without a tensor on
            disk (a tied head, parts of a split matrix); a format's skip list is this less what was quantized.
        expert_parameters: the stacked parameters of experts in the model's order, in which PEFT wraps them.
        modules: every module of the model; empty if names and shapes were used.
        splits_patterns: PEFT reduces a pattern in `target_modules` to the last parts of the modules it matches.
        unbuilt: why the class could not be built, as the start of a sentence; "" if it was.
        rebuilt_for: values of `quant_method` for which transformers loads other modules than the config describes.
    """

    architecture: str | None
    model_type: str | None
    task_type: str | None
    base_model_prefix: str
    roles: tuple[TensorRole, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    linear_modules: tuple[str, ...]
    expert_parameters: tuple[str, ...] = ()
    rebuilt_for: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()
    splits_patterns: bool = False
    unbuilt: str = ""


def map_modules(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModuleMap:
    """Find the role of every tensor of a checkpoint; reads neither weights nor files.

    Args:
        config: parsed config.json. Its `quantization_config` and `auto_map` are ignored.
        shapes: names on disk -> shapes, in the order of the checkpoint.

    Returns:
        The map; see `ModuleMap`.

    Raises:
        LoftqError: a tensor's shape contradicts the config.
    """
    built = build_on_meta(config, len(shapes))
    model = built.model
    if model is None:
        return _map_by_name(config, shapes, built)
    names, more_notes = runtime_names(model, list(shapes))
    view = ModelView.of(model)
    roles = tuple(_role(view, tensor, names[tensor], tuple(shape)) for tensor, shape in shapes.items())
    experts = {role.parameter for role in roles if role.expert is not None}
    unknown = [tensor for tensor in shapes if names[tensor].key is None and not view.expects_unknown(tensor)]
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        count = "1 tensor is" if len(unknown) == 1 else f"{len(unknown)} tensors are"
        more_notes.append(f"{count} not part of {view.name}, so transformers ignores: {shown}")
    return ModuleMap(
        architecture=view.name,
        model_type=model.config.model_type,
        task_type=_task_type(model),
        base_model_prefix=model.base_model_prefix or "",
        roles=roles,
        missing=view.missing(names.values()),
        notes=(*built.notes, *more_notes),
        linear_modules=view.linear_modules,
        expert_parameters=tuple(name for name, _ in model.named_parameters() if name in experts),
        rebuilt_for=view.rebuilt_for,
        modules=tuple(view.modules),
        splits_patterns=bool(view.expert_names),
    )


def _role(view: ModelView, tensor: str, name: RuntimeName, shape: tuple[int, ...]) -> TensorRole:
    """Find the role of one tensor.

    Raises:
        LoftqError: the shape contradicts the config.
    """
    if name.key is None:
        return TensorRole(tensor, None, "other", Reason(Why.UNKNOWN, view.name), view.outside)
    expected = tuple(view.state[name.key].shape)
    if not name.merged and shape != expected:
        raise LoftqError(
            f"tensor {tensor} has shape {list(shape)} on disk but {view.name} built from config.json expects "
            f"{list(expected)}: check that config.json belongs to these weights."
        )
    path, _, parameter = name.key.rpartition(".")
    float32 = tuple(dtype for dtype, pattern in view.float32_dtypes.items() if pattern.search(name.key))
    if is_expert(view, name, path) and not is_router(view, path):
        expert = find_expert(view, name, path, shape)
        keep = expert_reason(view, name, expert)
        return TensorRole(tensor, name.key, "expert", keep, view.tower(path), name.key, expert, float32=float32)
    kind, keep = classify(view, name, path, parameter)
    module = path if parameter == "weight" and not name.merged else None
    # PEFT would treat an adapter on a module of this name as one on the experts.
    aside = kind == "linear" and keep is None and path.rpartition(".")[2] in view.expert_names
    tied = view.tied[name.key] if kind == "embedding" and keep is None and name.key in view.tied else ""
    optional = keep is not None and keep.why is Why.OUTSIDE_BASE
    other_name = name.key if aside else ""
    needs = layer_needs(view, name, path) if kind in ("linear", "conv1d", "head") else ()
    return TensorRole(tensor, module, kind, keep, view.tower(path), other_name, None, tied, optional, float32, needs)


def float32_tensors(config: Mapping[str, Any], tensors: Sequence[str], dtype: str) -> frozenset[str]:
    """Return the tensors that transformers keeps in float32 when it loads the model in `dtype`.

    Args:
        config: parsed config.json.
        tensors: names on disk.
    """
    model = build_on_meta(config, len(tensors)).model
    pattern = None if model is None else float32_patterns(model).get(dtype)
    if model is None or pattern is None:
        return frozenset()
    names, _ = runtime_names(model, tensors)
    return frozenset(tensor for tensor in tensors if pattern.search(names[tensor].key or ""))


def _task_type(model: PreTrainedModel) -> str | None:
    """Return PEFT's task type if PEFT's wrapper for it takes the same inputs as this class."""
    from transformers.models.auto import modeling_auto

    name, config = type(model).__name__, model.config
    if name in _class_names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "CAUSAL_LM"
    text_in = model.main_input_name == "input_ids" and config.is_encoder_decoder
    if text_in and name in _class_names(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return "SEQ_2_SEQ_LM"
    return None


def _class_names(table: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {name for names in table.values() for name in ([names] if isinstance(names, str) else names)}


def _map_by_name(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], built: Built) -> ModuleMap:
    """Map without a model class: large 2-D `*.weight` tensors are linear unless their names imply otherwise."""
    causal = (named_class(config) or "").endswith(("ForCausalLM", "LMHeadModel"))
    roles = tuple(_role_by_name(tensor, tuple(shape)) for tensor, shape in shapes.items())
    # Any tensor with two dimensions may be a Linear in the unknown model.
    matrices = [role for role in roles if role.module and len(shapes[role.tensor]) == 2]
    maybe = (role.module for role in matrices if role.keep is None or role.keep.why not in rules.TABLES)
    return ModuleMap(
        architecture=None,
        model_type=config.get("model_type"),
        task_type="CAUSAL_LM" if causal else None,
        base_model_prefix="",
        roles=roles,
        missing=(),
        notes=(*built.notes, f"{built.failure}: matrices are chosen by name and shape"),
        linear_modules=tuple(module for module in maybe if module),
        unbuilt=built.failure,
    )


def _role_by_name(tensor: str, shape: tuple[int, ...]) -> TensorRole:
    path, _, parameter = tensor.rpartition(".")
    keep = _why_by_name(tensor, path, parameter, shape)
    module = path if parameter == "weight" else None
    return TensorRole(tensor, module, "other" if keep else "linear", keep)


def _why_by_name(tensor: str, path: str, parameter: str, shape: tuple[int, ...]) -> Reason | None:
    if tensor.endswith("bias"):
        return Reason(Why.BIAS)
    words = set(re.split(r"[._\d]+", path.lower()))
    why = rules.LAST_NAMES.get(path.rpartition(".")[2].lower())
    why = why or next((why for word, why in rules.NAME_WORDS if word in words), None)
    if why is not None:
        return Reason(why)
    if len(shape) != 2 or parameter != "weight":
        return Reason(Why.NOT_MATRIX)
    small = min(shape) < rules.SMALLEST_MATRIX
    return Reason(Why.SMALL, str(rules.SMALLEST_MATRIX)) if small else None
