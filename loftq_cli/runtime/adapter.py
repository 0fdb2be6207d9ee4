"""Attach the LoftQ adapter to a backbone, even if the loaded class names its modules differently."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LoftqError
from loftq_cli.formats.adapter import CONFIG, WEIGHTS
from loftq_cli.modules.view import expert_names
from loftq_cli.runtime.paths import find_path, moved_prefixes

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ROOT = "base_model.model."
# The part after the module's path in an adapter key; nested `base_layer`s are stacked expert parameters.
_LEAF = re.compile(r"(\.base_layer)*\.lora_[A-Za-z_]+(\.weight|\.bias)?$")

# Modules that PEFT's wrapper for a task trains and saves, and therefore expects in the adapter file.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class _FittedAdapter:
    """The changes that make the adapter in the file fit the loaded class.

    Attributes:
        config: for the loaded class.
        renames: key in the file -> key for the loaded class; keys of modules that it does not have are left out.
        dropped: modules that it does not have.
        heads: modules whose current weights must be added to the adapter.
        changed: True if anything differs from the file.
    """

    config: LoraConfig
    renames: dict[str, str]
    dropped: tuple[str, ...]
    heads: tuple[str, ...]
    changed: bool


def find_adapter(name: str, source: Mapping[str, Any]) -> Path:
    """Return the folder of the adapter: in a local directory, or downloaded from the Hub into its cache.

    Args:
        source: Hub options (`revision`, `token`, ...).
    """
    from transformers.utils import cached_file

    files = [cached_file(name, file, **source) for file in (CONFIG, WEIGHTS)]
    return Path(str(files[0])).parent


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool, placement: Mapping[str, Any]) -> PeftModel:
    """Wrap `model` with the adapter in `folder`.

    If class and paths are those of the conversion, this is plain `PeftModel.from_pretrained`. Otherwise keys and config
    are renamed first, and adapters of modules that the class does not have are dropped with a warning.

    Args:
        placement: `device_map` and `max_memory` as given to the backbone.

    Raises:
        LoftqError: part of the adapter could not be loaded, or layers of the backbone are offloaded to disk.
    """
    from peft import LoraConfig, PeftModel

    from loftq_cli.runtime.pooled import with_pooled_layers

    if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        # PEFT would copy the offloaded shards into the working directory (0.21).
        raise LoftqError(
            "PEFT cannot wrap a model with layers offloaded to disk: load it with adapter=False, or give it more "
            "memory with `max_memory`."
        )
    file = folder / Path(WEIGHTS).name
    fit = _fit(LoraConfig.from_pretrained(str(folder)), _keys(file), model)
    if fit.dropped:
        shown = ", ".join(fit.dropped[:3])
        logger.warning("%s has no %s: %d adapter(s) left out.", type(model).__name__, shown, len(fit.dropped))
    options = {**_placement_for_peft(placement), "is_trainable": trainable}
    config = with_pooled_layers(fit.config)
    config.inference_mode = not trainable
    with warnings.catch_warnings():
        # PEFT 0.21 checks these keys against modules only and warns that it ignores those of parameters; it does not.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        with _one_sentence_for_misfits(model, folder):
            if fit.changed:
                with tempfile.TemporaryDirectory(prefix="loftq-") as fitted:
                    _write(fit, file, model, Path(fitted))
                    wrapped = PeftModel.from_pretrained(model, fitted, config=config, **options)
            else:
                wrapped = PeftModel.from_pretrained(model, folder, config=config, **options)
    _check_complete(wrapped, fit.renames.values())
    return wrapped


@contextmanager
def _one_sentence_for_misfits(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Turn PEFT's error about shapes into one sentence.

    Raises:
        LoftqError: a factor has another shape than the layer needs.
    """
    try:
        yield
    except RuntimeError as error:
        first = re.search(r"size mismatch for (\S+): (.*)", str(error))
        if first is None:
            raise
        raise LoftqError(
            f"the adapter in {folder} does not fit {type(model).__name__} ({first[1]}: {first[2].rstrip('.')}): give "
            "an adapter that was trained on this model."
        ) from error


def _fit(config: LoraConfig, keys: Iterable[str], model: PreTrainedModel) -> _FittedAdapter:
    keys = list(keys)
    modules = frozenset(path for path, _ in model.named_modules(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", "")
    moved = moved_prefixes(model, (f"{_split(key)[0]}.weight" for key in keys))
    moved |= moved_prefixes(model, config.target_parameters or ())
    renames, dropped = {}, set()
    for key in keys:
        path, leaf = _split(key)
        found = find_path(path, modules, prefix, moved)
        if found is None:
            dropped.add(path)
        else:
            renames[key] = f"{_ROOT}{found}{leaf}"
    if not any(".lora_" in key for key in renames):
        raise LoftqError(
            f"the adapter has no module in common with {type(model).__name__}: load the class in config.json, or "
            "another of the same family, or give adapter=False if the backbone alone is wanted, which is in full "
            "precision there."
        )
    renamed = bool(dropped) or any(old != new for old, new in renames.items())
    if renamed:
        _rename_config(config, model, renames.values(), dropped, moved)
    task_type = config.task_type
    config.task_type = _task_type(model, config)
    heads = _missing_heads(model, config, keys)
    changed = renamed or bool(heads) or config.task_type != task_type
    return _FittedAdapter(config, renames, tuple(sorted(dropped)), heads, changed)


def _split(key: str) -> tuple[str, str]:
    """Split `base_model.model.a.b.lora_A.weight` into (`a.b`, `.lora_A.weight`); other keys before their last part."""
    bare = key.removeprefix(_ROOT)
    leaf = _LEAF.search(bare)
    at = leaf.start() if leaf else bare.rindex(".")
    return bare[:at], bare[at:]


def _rename_config(
    config: LoraConfig, model: PreTrainedModel, keys: Iterable[str], dropped: Container[str], moved: Mapping[str, str]
) -> None:
    """Rename the modules for this class: exactly those of `keys`, whatever the file's list or pattern was."""
    prefix = getattr(model, "base_model_prefix", "")
    places = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    if config.target_parameters:
        named = [find_path(entry, places, prefix, moved) for entry in config.target_parameters]
        config.target_parameters = [entry for entry in named if entry]
    aside = {name.rpartition(".")[0] for name in config.target_parameters or ()}
    layers = sorted({_split(key)[0] for key in keys if ".lora_" in key} - aside)
    # In models with experts PEFT splits a pattern into its parts, and would adapt every module that ends like one.
    config.target_modules = layers if aside or expert_names(model) else "|".join(re.escape(path) for path in layers)
    for field in ("rank_pattern", "alpha_pattern"):
        kept = {key: value for key, value in getattr(config, field).items() if key not in dropped}
        setattr(config, field, {find_path(key, places, prefix, moved) or key: value for key, value in kept.items()})


def _task_type(model: PreTrainedModel, config: LoraConfig) -> str | None:
    """Return PEFT's task type for this class; the class that the adapter was made for keeps the file's."""
    kind = type(model).__name__
    if kind in (getattr(model.config, "architectures", None) or ()):
        return config.task_type
    if kind.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if kind.endswith("ForTokenClassification"):
        return "TOKEN_CLS"
    if kind.endswith("ForQuestionAnswering"):
        return "QUESTION_ANS"
    if kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return None


def _missing_heads(model: PreTrainedModel, config: LoraConfig, keys: Iterable[str]) -> tuple[str, ...]:
    """Return the heads that PEFT expects in the adapter file and that are not in it."""
    wanted = _HEADS.get(config.task_type or "", ())
    present = tuple(keys)
    return tuple(
        path
        for path, module in model.named_modules()
        if wanted and path.endswith(wanted) and module.state_dict()
        and not any(key.startswith(f"{_ROOT}{path}.") for key in present)
    )  # fmt: skip


def _write(fit: _FittedAdapter, file: Path, model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter with this class's names into `folder`, as PEFT reads it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        tensors = {new: opened.get_tensor(old) for old, new in fit.renames.items()}
    for head in fit.heads:
        for name, tensor in model.get_submodule(head).state_dict().items():
            tensors[f"{_ROOT}{head}.{name}"] = tensor.cpu().contiguous()
    fit.config.save_pretrained(str(folder))
    save_file(tensors, folder / Path(WEIGHTS).name, metadata={"format": "pt"})


def _placement_for_peft(placement: Mapping[str, Any]) -> dict[str, Any]:
    """Add PEFT's prefix to the device map: PEFT dispatches a model with offloaded layers again, after wrapping it."""
    options = dict(placement)
    if isinstance(options.get("device_map"), Mapping):
        devices = options["device_map"].items()
        options["device_map"] = {f"{_ROOT}{path}" if path else "": device for path, device in devices}
    return {key: value for key, value in options.items() if value is not None}


def _check_complete(wrapped: PeftModel, keys: Iterable[str]) -> None:
    """Check that the file and the model have the same LoRA weights.

    Raises:
        LoftqError: PEFT skipped a weight, or initialized one at random.
    """
    name = wrapped.active_adapter
    have = {key for key in wrapped.state_dict() if ".lora_" in key and f".{name}" in key}
    given = {_with_adapter(key, name) for key in keys if ".lora_" in key}
    lost, made_up = sorted(given - have), sorted(have - given)
    if lost or made_up:
        raise LoftqError(
            f"the adapter does not fit {type(wrapped.get_base_model()).__name__}: {len(lost)} of its weights are not "
            f"in the model and {len(made_up)} of the model's are not in the file (the first: '{(lost + made_up)[0]}')."
        )


def _with_adapter(key: str, name: str) -> str:
    """Insert the adapter's name, which PEFT's files omit, into a key."""
    head, _, leaf = key.rpartition(".")
    return f"{head}.{name}.{leaf}" if leaf in ("weight", "bias") else f"{key}.{name}"


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
