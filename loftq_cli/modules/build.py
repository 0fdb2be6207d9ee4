"""Build a model without weights from config.json.

Needs transformers 5. Nothing is read from disk or network; code that comes with a checkpoint (`auto_map`) is never
imported.
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

# Fields that control how the model is loaded or run, not its structure. Some would require libraries or code that may
# not be installed.
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

# Counts of things that are created one by one. A checkpoint may hold many of them in one tensor, but not any number.
_COUNT = re.compile(
    r"layers?$|depths?$|blocks?$|(^|_)n_layer|num_(local_)?experts|n_routed_experts|num_codebooks|stages?$"
)
_SMALLEST_LIMIT = 3000

# Mappings whose keys are data, such as the names of labels (`label2id`), and not fields of a sub-config.
_DATA = re.compile(r"2ids?$|^id2|_to_ids?$|^task_specific_params$")


@dataclass(frozen=True)
class Built:
    """A model on the meta device.

    Attributes:
        model: None if this version of transformers cannot build it; `failure` then gives the reason.
        notes: sentences for the user.
    """

    model: PreTrainedModel | None
    notes: tuple[str, ...] = ()
    failure: str = ""


def build_on_meta(config: Mapping[str, Any], tensors: int) -> Built:
    """Build the class that `config` names, on the meta device.

    Args:
        tensors: number of tensors in the checkpoint; building stops early if the model is much larger.

    Raises:
        LoftqError: the config describes a model with far more layers than the checkpoint has tensors.
    """
    import torch
    import transformers

    model_type, version = str(config.get("model_type")), f"transformers {transformers.__version__}"
    notes: list[str] = []
    most = _SMALLEST_LIMIT + 10 * tensors
    _refuse_huge_counts(config, most)
    with _quiet(), _limit_parameters(most):
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
    """Build the class that `config` names, in float32 and evaluation mode: parameters on the meta device, buffers real.

    Raises:
        LoftqError: this version of transformers cannot build it.
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
                model.tie_weights()  # moving to the meta device untied them
                return model
        except Exception as error:  # a class may fail in any way, or lack a library
            cause: Exception | str = " ".join(str(error).split())[:200]
            raise LoftqError(_NOT_BUILT.format(config.get("model_type"), f"{type(error).__name__}: {cause}")) from error
    raise LoftqError(_NOT_BUILT.format(config.get("model_type"), "it is unknown"))


def load_whole(model_class: type[PreTrainedModel], path: Path) -> PreTrainedModel:
    """Load a model from a directory with transformers, in float32 and evaluation mode."""
    import torch

    with _quiet(), _no_bars():
        model: PreTrainedModel = open_pretrained(model_class, path, dtype=torch.float32)
        return model.eval()


def _refuse_huge_counts(config: Mapping[str, Any], most: int) -> None:
    """Check the counts first: configs create lists as long as the number of layers before any layer is built."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            if not _DATA.search(name):
                _refuse_huge_counts(value, most)
        elif _COUNT.search(name):
            counts = value if isinstance(value, list) else [value]
            worst = max((count for count in counts if isinstance(count, int)), default=0)
            if worst > most:
                raise _too_large(f"{name} = {worst if worst < 10**20 else '…'}")


@contextlib.contextmanager
def _limit_parameters(most: int) -> Iterator[None]:
    """Stop building a model once it has more than `most` parameters, whichever config field asked for them."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made, builder = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == builder
        if made > most:
            raise _too_large(f"more than {most} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _too_large(request: str) -> LoftqError:
    return LoftqError(
        f"config.json asks for {request}, but the checkpoint has too few tensors for that: check that it belongs to "
        "these weights."
    )


def _find_class(config: Mapping[str, Any], notes: list[str]) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """Return the class to build and its config, or None for a model type that transformers does not have."""
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
            notes.append(f"class {wanted} is unknown to transformers: {cls.__name__} is used instead")
    return None if cls is None else (cls, built)


def named_class(config: Mapping[str, Any]) -> str | None:
    """Return the first of `architectures`, which is not always a list of strings."""
    named = config.get("architectures")
    first = next(iter(named), None) if isinstance(named, list) else named
    return first if isinstance(first, str) else None


def _own_class(name: object) -> type[PreTrainedModel] | None:
    """Return the class called `name` if it is one of transformers' own models."""
    import transformers

    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    own = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if own and cls.__module__.startswith("transformers.") else None


def _class_for(model_type: str, wanted: str | None, config_class: type) -> type[PreTrainedModel] | None:
    """Return the class of this name in any capitalization (`LLaMAForCausalLM`), or else the bare model."""
    import transformers
    from transformers.models.auto import modeling_auto

    for table, names in vars(modeling_auto).items():
        name = names.get(model_type) if table.endswith("_MAPPING_NAMES") else None
        if wanted is not None and isinstance(name, str) and name.lower() == wanted.lower():
            return _own_class(name)
    bare = transformers.MODEL_MAPPING.get(config_class, None)
    return bare[0] if isinstance(bare, tuple) else bare


def _structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config and its sub-configs without the fields that do not affect the model's structure."""
    return {key: _plain(value) for key, value in config.items() if key not in _NOT_STRUCTURE}


def _plain(value: Any) -> Any:
    """Clean one field. JSON cannot express infinity, so transformers writes it as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else _structure(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, whose warnings about a config are of no use while a model is only inspected."""
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
    """Hide the progress bar that transformers shows for every model it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
