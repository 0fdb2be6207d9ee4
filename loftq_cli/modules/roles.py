"""Which tensors of a checkpoint are matrices, where the running model keeps them, and which must stay as they are.

There is no table of architectures. The class that config.json names is built on the meta device; its modules say what
is a Linear, and transformers' conversion mapping says how a name on disk becomes a module path. What has to stay in
full precision is told by the model too: ties, float32 lists, routers, weights that other code reads
(`module_exceptions`). Without a model class, names and shapes are left (`_map_by_name`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loftq_cli.errors import LoftqError
from loftq_cli.modules import keep_rules as rules
from loftq_cli.modules.build import build_on_meta, named_class
from loftq_cli.modules.experts import Expert, find_expert, is_expert
from loftq_cli.modules.keep_rules import Tower
from loftq_cli.modules.names import RuntimeName, runtime_names
from loftq_cli.modules.view import ModelView

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "head", "embedding", "expert", "other"]


@dataclass(frozen=True)
class TensorRole:
    """What one tensor of the checkpoint is.

    Attributes:
        tensor: name on disk, e.g. "bert.encoder.layer.0.attention.self.query.weight".
        module: path of the module in the transformers-5 model whose `weight` this is (what PEFT targets); of an
            expert's matrix the path of the parameter; None for biases, other bare parameters and tensors that
            transformers ignores.
        kind: "linear" is an nn.Linear stored [out, in]; "conv1d" a transformers Conv1D stored [in, out]; "head" the
            output embedding; "embedding" the input embedding table [vocabulary, width]; "expert" a matrix of a mixture
            of experts, or all of them in a 3-D tensor; "other" everything else.
        keep: the reason this tensor has to stay in full precision whatever the user asks; None when it may be
            quantized.
        tower: which part of a multimodal model it belongs to; "text" everywhere in a model of one modality.
        parameter: the parameter that PEFT must adapt in place of the module; "" for none.
        expert: the place of an expert's matrix; of a 3-D tensor that of its first one.
        tied: the parameter that shares an embedding table which may be quantized all the same; "" for none.
    """

    tensor: str
    module: str | None
    kind: Kind
    keep: str | None
    tower: Tower = "text"
    parameter: str = ""
    expert: Expert | None = None
    tied: str = ""


@dataclass(frozen=True)
class ModuleMap:
    """The whole checkpoint.

    Attributes:
        architecture: the class that was built, e.g. "LlamaForCausalLM"; None when names and shapes had to do.
        model_type: `model_type` of config.json.
        task_type: PEFT's "CAUSAL_LM" or "SEQ_2_SEQ_LM"; None otherwise, since PEFT would add heads or rename inputs.
        base_model_prefix: attribute of the base model inside the class, "" when unknown.
        roles: one per tensor of the checkpoint, in the order given.
        missing: parameters of at least two dimensions that the model has and the checkpoint lacks, without tied ones.
        notes: sentences for the user.
        linear_modules: every module that a quantizer or PEFT would take for a Linear, with or without a tensor on
            disk (a tied head, parts of a split matrix); the skip list of a format is this less what was quantized.
        expert_parameters: the stacked parameters of experts in the model's order, in which PEFT wraps them.
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


def map_modules(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModuleMap:
    """Finds the role of every tensor of a checkpoint; reads neither weights nor files.

    Args:
        config: config.json, parsed. Its `quantization_config` and `auto_map` are not looked at.
        shapes: names on disk -> shapes, in the order of the checkpoint.

    Returns:
        The map; see `ModuleMap`.

    Raises:
        LoftqError: a tensor's shape contradicts the config.
    """
    model, notes = build_on_meta(config, len(shapes))
    if model is None:
        return _map_by_name(config, shapes, notes)
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
        notes=(*notes, *more_notes),
        linear_modules=view.linear_modules,
        expert_parameters=tuple(name for name, _ in model.named_parameters() if name in experts),
        rebuilt_for=view.rebuilt_for,
    )


def _role(view: ModelView, tensor: str, name: RuntimeName, shape: tuple[int, ...]) -> TensorRole:
    """The role of one tensor.

    Raises:
        LoftqError: the shape contradicts the config.
    """
    if name.key is None:
        return TensorRole(tensor, None, "other", f"not part of {view.name} (ignored by transformers)", view.outside)
    expected = tuple(view.state[name.key].shape)
    if not name.merged and shape != expected:
        raise LoftqError(
            f"tensor {tensor} has shape {list(shape)} on disk but {view.name} built from config.json expects "
            f"{list(expected)}: check that config.json belongs to these weights."
        )
    path, _, parameter = name.key.rpartition(".")
    if is_expert(view, name, path) and not _is_router(view, path):
        expert = find_expert(view, name, path, shape)
        keep = _tied(view, name) or _float32(view, name) or (None if expert else rules.REARRANGED)
        return TensorRole(tensor, name.key, "expert", keep, view.tower(path), name.key, expert)
    kind, keep = _judge(view, name, path, parameter)
    module = path if parameter == "weight" and not name.merged else None
    # PEFT would take an adapter on a module of this name for one on the experts.
    aside = kind == "linear" and keep is None and path.rpartition(".")[2] in view.expert_names
    tied = view.tied[name.key] if kind == "embedding" and keep is None and name.key in view.tied else ""
    return TensorRole(tensor, module, kind, keep, view.tower(path), name.key if aside else "", tied=tied)


def _judge(view: ModelView, name: RuntimeName, path: str, parameter: str) -> tuple[Kind, str | None]:
    """Kind of a known tensor, and why it has to stay in full precision."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module = view.modules[path]
    if name.merged or parameter != "weight" or not isinstance(module, nn.Linear | Conv1D):
        table = parameter == "weight" and path in view.embedding and not name.merged
        if table and isinstance(module, nn.Embedding):
            keep = _why_embedding(module) or _float32(view, name) or _read(view, path)
            tied = None if keep is None and _ties_are_plain(view, name) else _tied(view, name)
            return "embedding", tied or keep
        return "other", _why_other(view, name, path, parameter)
    keep = _tied(view, name) or _why_linear(view, name, path) or _float32(view, name) or _read(view, path)
    if path in view.heads:
        return "head", keep
    outside = view.base and not path.startswith(view.base)
    if keep is None and (outside or rules.TASK_HEAD_NAME.match(path)):
        keep = rules.TASK_HEAD
    return "conv1d" if isinstance(module, Conv1D) else "linear", keep


def _tied(view: ModelView, name: RuntimeName) -> str | None:
    other = view.tied.get(name.key or "")
    return f"tied to {other}" if other else None


def _ties_are_plain(view: ModelView, name: RuntimeName) -> bool:
    """Whether all that share a table look it up or multiply by it, as packed layers do."""
    from torch import nn

    sharing = view.sharing(name.key or "")
    for key in sharing:
        path, _, parameter = key.rpartition(".")
        module = view.modules[path]
        plain = type(module).forward in (nn.Linear.forward, nn.Embedding.forward) and path not in view.readers
        if parameter != "weight" or not plain or (view.float32 and view.float32.search(key)):
            return False
    return True


def _float32(view: ModelView, name: RuntimeName) -> str | None:
    return rules.FLOAT32 if view.float32 and view.float32.search(name.key or "") else None


def _read(view: ModelView, path: str) -> str | None:
    return f"its weight is read directly by {view.readers[path]}" if path in view.readers else None


def _why_linear(view: ModelView, name: RuntimeName, path: str) -> str | None:
    """Reasons that lie in the Linear itself: it routes, or its forward is not x @ W.T + b."""
    from torch import nn

    if _is_router(view, path):
        return rules.ROUTER
    cls = type(view.modules[path])
    own_forward = isinstance(view.modules[path], nn.Linear) and cls.forward is not nn.Linear.forward
    return f"custom module {cls.__name__}" if own_forward and cls.__name__ not in rules.PLAIN_LINEAR_CLASSES else None


def _why_embedding(module: nn.Embedding) -> str | None:
    """A packed table gives its rows as they are; some models scale them in a forward of their own."""
    from torch import nn

    plain = type(module).forward is nn.Embedding.forward and module.max_norm is None
    return None if plain else f"custom module {type(module).__name__}"


def _is_router(view: ModelView, path: str) -> bool:
    """Whether a module decides between experts, or lies inside one that does."""
    parts = path.split(".")
    around = (view.modules[".".join(parts[:length])] for length in range(1, len(parts) + 1))
    if any(rules.ROUTER_CLASS.search(type(module).__name__) for module in around):
        return True
    parent = view.modules[".".join(parts[:-1])]
    return parts[-1].endswith("router") or (parts[-1] in rules.ROUTER_NAMES and hasattr(parent, "experts"))


def _why_other(view: ModelView, name: RuntimeName, path: str, parameter: str) -> str:
    """The reason for a tensor that is no Linear's, Conv1D's or embedding table's weight."""
    from torch import nn

    module, key = view.modules[path], name.key or ""
    if parameter.endswith("bias"):
        return rules.BIAS
    if "Norm" in type(module).__name__:
        return rules.NORM
    if isinstance(module, nn.modules.conv._ConvNd):
        return rules.CONVOLUTION
    if isinstance(module, nn.Embedding):
        positional = any(word in path.lower() for word in rules.POSITION_WORDS)
        return _tied(view, name) or (rules.POSITION if positional else rules.EMBEDDING)
    if view.state[key].ndim > 1 and _is_router(view, path):
        return rules.ROUTER
    if view.state[key].ndim > 1 and "expert" in f"{key} {type(module).__name__}".lower():
        return rules.EXPERTS
    if name.merged:
        return rules.REARRANGED
    if ".parametrizations." in f".{key}":
        return rules.PARAMETRIZED
    matrix = parameter == "weight" and view.state[key].ndim == 2
    return f"custom module {type(module).__name__}" if matrix else rules.NOT_MATRIX


def _task_type(model: PreTrainedModel) -> str | None:
    """PEFT's task type, where PEFT's wrapper for it takes what this class takes."""
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


def _map_by_name(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], notes: list[str]) -> ModuleMap:
    """The map without a model class: large 2-D `*.weight` tensors are linear unless their names say otherwise."""
    causal = (named_class(config) or "").endswith(("ForCausalLM", "LMHeadModel"))
    roles = tuple(_role_by_name(tensor, tuple(shape)) for tensor, shape in shapes.items())
    # Whatever has two dimensions may be a Linear in the model that nobody here has seen.
    maybe = (r.module for r in roles if r.module and len(shapes[r.tensor]) == 2 and r.keep not in rules.TABLES)
    return ModuleMap(
        architecture=None,
        model_type=config.get("model_type"),
        task_type="CAUSAL_LM" if causal else None,
        base_model_prefix="",
        roles=roles,
        missing=(),
        notes=tuple(notes),
        linear_modules=tuple(maybe),
    )


def _role_by_name(tensor: str, shape: tuple[int, ...]) -> TensorRole:
    path, _, parameter = tensor.rpartition(".")
    words = set(re.split(r"[._\d]+", path.lower()))
    said = rules.LAST_NAMES.get(path.rpartition(".")[2].lower())
    said = said or next((reason for word, reason in rules.NAME_WORDS if word in words), None)
    if tensor.endswith("bias"):
        said = rules.BIAS
    elif len(shape) != 2 or parameter != "weight":
        said = said or rules.NOT_MATRIX
    elif said is None and min(shape) < rules.SMALLEST_MATRIX:
        said = f"smaller than {rules.SMALLEST_MATRIX}"
    module = path if parameter == "weight" else None
    return TensorRole(tensor, module, "other" if said else "linear", said)
