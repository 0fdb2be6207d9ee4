"""From config.json to a model without weights.

Needs transformers 5. Nothing is read from disk or network; code that a checkpoint brings
along (`auto_map`) is never imported.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LoftqError
from loftq_cli.machine.pretrained import open_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Fields that say how to load or run the model, not what it is. Some would ask for libraries or code that is not here.
_NOT_STRUCTURE = frozenset(
    {
        "quantization_config",
        "auto_map",
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "_attn_implementation",
        "_name_or_path",
        "transformers_version",
    }
)

_NOT_BUILT = "transformers cannot build model type {} from this config.json ({}), so it cannot be run."

# Numbers of things that are made one by one. A checkpoint may hold many of them in one tensor, but not without end.
_COUNT = re.compile(
    r"layers?$|depths?$|blocks?$|(^|_)n_layer|num_(local_)?experts|n_routed_experts|num_codebooks|stages?$"
)
_SMALLEST_LIMIT = 3000


@dataclass(frozen=True)
class Built:
    """A model on the meta device.

    Attributes:
        model: None when this transformers cannot build it; `failure` then says why.
        notes: sentences for the user.
    """

    model: PreTrainedModel | None
    notes: tuple[str, ...] = ()
    failure: str = ""


def build_on_meta(config: Mapping[str, Any], tensors: int) -> Built:
    """Build the class that `config` names, on the meta device.

    Args:
        tensors: how many the checkpoint has; a model that is much larger is not built to its end.

    Raises:
        LoftqError: the config describes a model of far more layers than the checkpoint has tensors.
    """
    import torch
    import transformers

    model_type, version = str(config.get("model_type")), f"transformers {transformers.__version__}"
    notes: list[str] = []
    most = _SMALLEST_LIMIT + 10 * tensors
    _refuse_endless(config, most)
    with _quiet(), _at_most(most):
        try:
            found = _find_class(config, notes)
            if found is None:
                return Built(None, tuple(notes), f"model type {model_type} is unknown to {version}")
            cls, built_config = found
            with torch.device("meta"):
                return Built(cls._from_config(built_config), tuple(notes))  # type: ignore[no-untyped-call]
        except LoftqError:
            raise
        except Exception as error:  # a class may fail in any way, or lack a library
            cause = " ".join(str(error).split())[:200]
            failed = f"{version} cannot build model type {model_type} from this config.json"
            return Built(None, tuple(notes), f"{failed} ({type(error).__name__}: {cause})")


def build_empty(config: Mapping[str, Any]) -> PreTrainedModel:
    """The class that `config` names, in float32 and evaluation mode: parameters on the meta device, buffers real.

    Raises:
        LoftqError: this transformers cannot build it.
    """
    import torch
    from accelerate import init_empty_weights

    with _quiet():
        try:
            found = _find_class(config, [])
            if found is not None:
                cls, built_config = found
                built_config.dtype = torch.float32
                with init_empty_weights(include_buffers=False):
                    model = cls._from_config(built_config).eval()  # type: ignore[no-untyped-call]
                model.tie_weights()  # the move to the meta device parted what is tied
                return model
        except Exception as error:  # a class may fail in any way, or lack a library
            cause: Exception | str = " ".join(str(error).split())[:200]
            raise LoftqError(_NOT_BUILT.format(config.get("model_type"), f"{type(error).__name__}: {cause}")) from error
    raise LoftqError(_NOT_BUILT.format(config.get("model_type"), "it is unknown"))


def load_whole(model_class: type[PreTrainedModel], path: Path) -> PreTrainedModel:
    """A model with its weights in float32 and evaluation mode, as transformers loads it from a directory."""
    import torch

    with _quiet(), _no_bars():
        model: PreTrainedModel = open_pretrained(model_class, path, dtype=torch.float32)
        return model.eval()


def _refuse_endless(config: Mapping[str, Any], most: int) -> None:
    """Configs make lists as long as the number of layers before any layer is built."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _refuse_endless(value, most)
        elif _COUNT.search(name):
            counts = value if isinstance(value, list) else [value]
            worst = max((count for count in counts if isinstance(count, int)), default=0)
            if worst > most:
                raise _endless(f"{name} = {worst if worst < 10**20 else '…'}")


@contextlib.contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Stop the making of a model with more parameters than that, however its config came to ask for them."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made, builder = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == builder
        if made > most:
            raise _endless(f"more than {most} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _endless(what: str) -> LoftqError:
    return LoftqError(
        f"config.json asks for {what}, of which the checkpoint has too few tensors: check that it belongs to these "
        "weights."
    )


def _find_class(config: Mapping[str, Any], notes: list[str]) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The class to build and its config; None for a model type that transformers does not have."""
    import transformers

    wanted = named_class(config)
    cls = _own_class(wanted)
    model_type = config.get("model_type")
    if model_type in transformers.CONFIG_MAPPING:
        config_class = transformers.CONFIG_MAPPING[str(model_type)]
    elif cls is not None and cls.config_class is not None and model_type is None:
        config_class = cls.config_class
    else:
        return None
    built = config_class.from_dict(_structure(config))
    if cls is None:
        cls = _class_for(str(model_type), wanted, config_class)
        if cls is not None and wanted is not None:
            notes.append(f"class {wanted} is unknown to transformers: {cls.__name__} was taken instead")
    return None if cls is None else (cls, built)


def named_class(config: Mapping[str, Any]) -> str | None:
    """The first of `architectures`, which people and programs write in other ways too."""
    named = config.get("architectures")
    first = next(iter(named), None) if isinstance(named, list) else named
    return first if isinstance(first, str) else None


def _own_class(name: object) -> type[PreTrainedModel] | None:
    """The class of that name if it is one of transformers' own models."""
    import transformers

    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    own = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if own and cls.__module__.startswith("transformers.") else None


def _class_for(model_type: str, wanted: str | None, config_class: type) -> type[PreTrainedModel] | None:
    """The auto class's choice: of the same name but for capitals (`LLaMAForCausalLM`), else the bare model."""
    import transformers
    from transformers.models.auto import modeling_auto

    for table, names in vars(modeling_auto).items():
        name = names.get(model_type) if table.endswith("_MAPPING_NAMES") else None
        if wanted is not None and isinstance(name, str) and name.lower() == wanted.lower():
            return _own_class(name)
    bare = transformers.MODEL_MAPPING.get(config_class, None)
    return bare[0] if isinstance(bare, tuple) else bare


def _structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config and its sub-configs without the fields that do not shape the model."""
    return {key: _plain(value) for key, value in config.items() if key not in _NOT_STRUCTURE}


def _plain(value: Any) -> Any:
    """One field; transformers writes an infinite number as {"__float__": "Infinity"}, which JSON has no word for."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else _structure(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns about configs it reads; here nobody asked for the model."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for every model it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
