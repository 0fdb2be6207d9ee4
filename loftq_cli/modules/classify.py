"""Classify one tensor of a known model: the kind of matrix, and the reason to keep it in full precision, if any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loftq_cli.modules import keep_rules as rules
from loftq_cli.modules.reasons import Reason, Why

if TYPE_CHECKING:
    from torch import nn

    from loftq_cli.modules.experts import Expert
    from loftq_cli.modules.names import RuntimeName
    from loftq_cli.modules.view import ModelView

Kind = Literal["linear", "conv1d", "head", "embedding", "expert", "other"]


def classify(view: ModelView, name: RuntimeName, path: str, parameter: str) -> tuple[Kind, Reason | None]:
    """Return the kind of a tensor that is not an expert's, and the reason to keep it in full precision, if any."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module = view.modules[path]
    if name.merged or parameter != "weight" or not isinstance(module, nn.Linear | Conv1D):
        table = parameter == "weight" and path in view.embedding and not name.merged
        if table and isinstance(module, nn.Embedding):
            keep = _embedding_reason(module) or _float32(view, name) or _read_directly(view, path)
            keep = keep or _unquantized_read(view, path) or _dtype_read(view, path)
            tied = None if keep is None and _ties_are_plain(view, name) else _tied(view, name)
            return "embedding", tied or keep
        return "other", _other_reason(view, name, path, parameter)
    keep = _tied(view, name) or _linear_reason(view, path) or _read_directly(view, path)
    if path in view.heads:
        return "head", keep
    if keep is None and rules.TASK_HEAD_NAME.match(path):
        keep = Reason(Why.TASK_HEAD)
    elif keep is None and view.base and not path.startswith(view.base):
        keep = Reason(Why.OUTSIDE_BASE)
    return "conv1d" if isinstance(module, Conv1D) else "linear", keep


def layer_needs(view: ModelView, name: RuntimeName, path: str) -> tuple[Reason, ...]:
    """Return what the running model needs of a linear layer besides its forward, each as the reason to keep the tensor
    in a container that does not meet it (`Container.unmet`)."""
    return tuple(filter(None, (_float32(view, name), _unquantized_read(view, path), _dtype_read(view, path))))


def expert_reason(view: ModelView, name: RuntimeName, expert: Expert | None) -> Reason | None:
    """Return the reason to keep a tensor of experts in full precision, if any; `expert` comes from `find_expert`."""
    return _tied(view, name) or _float32(view, name) or (None if expert else Reason(Why.REARRANGED))


def _tied(view: ModelView, name: RuntimeName) -> Reason | None:
    other = view.tied.get(name.key or "")
    return Reason(Why.TIED, other) if other else None


def _ties_are_plain(view: ModelView, name: RuntimeName) -> bool:
    """True if every module that shares a table looks rows up or multiplies by it, as packed layers do."""
    from torch import nn

    sharing = view.sharing(name.key or "")
    for key in sharing:
        path, _, parameter = key.rpartition(".")
        module = view.modules[path]
        read = path in {*view.readers, *view.unquantized_readers, *view.dtype_readers}
        plain = type(module).forward in (nn.Linear.forward, nn.Embedding.forward) and not read
        if parameter != "weight" or not plain or (view.float32 and view.float32.search(key)):
            return False
    return True


def _float32(view: ModelView, name: RuntimeName) -> Reason | None:
    return Reason(Why.FLOAT32) if view.float32 and view.float32.search(name.key or "") else None


def _read_directly(view: ModelView, path: str) -> Reason | None:
    return Reason(Why.READ_DIRECTLY, view.readers[path]) if path in view.readers else None


def _unquantized_read(view: ModelView, path: str) -> Reason | None:
    reader = view.unquantized_readers.get(path)
    return Reason(Why.UNQUANTIZED_READ, reader) if reader else None


def _dtype_read(view: ModelView, path: str) -> Reason | None:
    return Reason(Why.DTYPE_READ, view.dtype_readers[path]) if path in view.dtype_readers else None


def _linear_reason(view: ModelView, path: str) -> Reason | None:
    """Return a reason that lies in the Linear itself: it is a router, or its forward is not x @ W.T + b."""
    from torch import nn

    if is_router(view, path):
        return Reason(Why.ROUTER)
    cls = type(view.modules[path])
    own_forward = isinstance(view.modules[path], nn.Linear) and cls.forward is not nn.Linear.forward
    custom = own_forward and cls.__name__ not in rules.PLAIN_LINEAR_CLASSES
    return Reason(Why.CUSTOM_MODULE, cls.__name__) if custom else None


def _embedding_reason(module: nn.Embedding) -> Reason | None:
    """Return a reason if the table does more than look rows up, which is all that a packed table does."""
    from torch import nn

    plain = type(module).forward is nn.Embedding.forward and module.max_norm is None
    return None if plain else Reason(Why.CUSTOM_MODULE, type(module).__name__)


def is_router(view: ModelView, path: str) -> bool:
    """True if a module chooses between experts, or is inside one that does."""
    parts = path.split(".")
    around = (view.modules[".".join(parts[:length])] for length in range(1, len(parts) + 1))
    if any(rules.ROUTER_CLASS.search(type(module).__name__) for module in around):
        return True
    parent = view.modules[".".join(parts[:-1])]
    return parts[-1].endswith("router") or (parts[-1] in rules.ROUTER_NAMES and hasattr(parent, "experts"))


def _other_reason(view: ModelView, name: RuntimeName, path: str, parameter: str) -> Reason:
    """Return the reason for a tensor that is not the weight of a Linear, a Conv1D or the input embedding."""
    from torch import nn

    module, key = view.modules[path], name.key or ""
    if parameter.endswith("bias"):
        return Reason(Why.BIAS)
    if "Norm" in type(module).__name__:
        return Reason(Why.NORM)
    if isinstance(module, nn.modules.conv._ConvNd):
        return Reason(Why.CONVOLUTION)
    if isinstance(module, nn.Embedding):
        positional = any(word in path.lower() for word in rules.POSITION_WORDS)
        return _tied(view, name) or Reason(Why.POSITION if positional else Why.EMBEDDING)
    if view.state[key].ndim > 1 and is_router(view, path):
        return Reason(Why.ROUTER)
    if view.state[key].ndim > 1 and "expert" in f"{key} {type(module).__name__}".lower():
        return Reason(Why.EXPERTS)
    if name.merged:
        return Reason(Why.REARRANGED)
    if ".parametrizations." in f".{key}":
        return Reason(Why.PARAMETRIZED)
    matrix = parameter == "weight" and view.state[key].ndim == 2
    return Reason(Why.CUSTOM_MODULE, type(module).__name__) if matrix else Reason(Why.NOT_MATRIX)
