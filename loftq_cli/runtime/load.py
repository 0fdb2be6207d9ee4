"""Load backbone and adapter in one call, for every container and every Auto class."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli._version import pip_install
from loftq_cli.checkpoint.local import read_json
from loftq_cli.checkpoint.trained_on import check_trained_on, conversion_in, conversion_on_hub
from loftq_cli.errors import LoftqError
from loftq_cli.formats import FORMATS, container_in, container_of
from loftq_cli.formats.adapter import CONFIG, FINGERPRINT, FOLDER, WEIGHTS
from loftq_cli.formats.loading import PLAIN, Loading, LoadRequest
from loftq_cli.machine.pretrained import open_pretrained
from loftq_cli.runtime.adapter import attach_adapter, find_adapter
from loftq_cli.runtime.other_class import other_dense_layers
from loftq_cli.runtime.paths import find_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Suffixes of the names of scales, after a module's path and after a weight's name. Those of all containers, because a
# damaged config.json may not name the right one.
_LAYER_SCALES = tuple(f".{name}" for container in FORMATS.values() for name in container.loading.layer_scales)
_TENSOR_SCALES = tuple({name: None for container in FORMATS.values() for name in container.loading.tensor_scales})

# Arguments of from_pretrained about the source of files; PEFT and AutoConfig need the same.
_SOURCE_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_PLACEMENT_OPTIONS = ("device_map", "max_memory")
# Fields of a config that from_pretrained takes as arguments of its own.
_NOT_CONFIG = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")


def load(
    path: str | PathLike[str],
    *,
    trainable: bool = False,
    adapter: bool | str | PathLike[str] = True,
    auto_class: Any = None,
    force: bool = False,
    **from_pretrained_kwargs: Any,
) -> nn.Module:
    """Load a model that `loftq quantize` wrote: the backbone, wrapped with the adapter.

    Args:
        path: the output directory, or the Hub id it was pushed to.
        trainable: leave the adapter trainable (and, in a classifier, its head).
        adapter: True for the initial adapter, False for the bare backbone, or the path of an adapter saved after
            training.
        auto_class: a transformers Auto class or model class, or the name of one. By default the class in config.json.
        force: use an adapter that was trained on another conversion, with a warning.
        from_pretrained_kwargs: passed on to `from_pretrained` (`dtype`, `device_map`, `revision`, `token`, ...).

    Returns:
        A `peft.PeftModel`, or with `adapter=False` the transformers model.

    Raises:
        LoftqError: the conversion is unfinished, a library is missing, backbone and adapter do not belong together,
            or a weight could not be loaded into the class.
    """
    from loftq_cli.runtime.quantizer import register

    register()
    name, options = str(path), from_pretrained_kwargs
    source, placement = _select(options, _SOURCE_OPTIONS), _select(options, _PLACEMENT_OPTIONS)
    _check_request(name, adapter is not False, adapter is True)
    config = _read_config(name, source, options)
    loading = _loading_of(Path(path), config)
    for package in loading.packages:
        _require(package.module, package.extra, "read this checkpoint")
    given = options.get("quantization_config")
    request = LoadRequest(name, _quantization(config), given, config.dtype, adapter is not False)
    if refusal := loading.refuse(request):
        raise LoftqError(refusal)
    folder = _adapter_folder(name, adapter, source)
    if folder is not None and adapter is not True:
        _check_trained_on(name, folder, source, force)
    options = {**loading.options(dataclasses.replace(request, adapter=folder is not None)), **options}
    model_class = _model_class(config, auto_class)
    if "config" not in options:
        options = _with_class_config(name, source, options, config, model_class, loading.skip_list)
    model = _load_backbone(model_class, name, options)
    if folder is None:
        return model
    if adapter is True:
        _check_same_conversion(folder.parent)
    return attach_adapter(model, folder, trainable=trainable, placement=placement)


def _adapter_folder(name: str, adapter: bool | str | PathLike[str], source: Mapping[str, Any]) -> Path | None:
    """Return the folder of the requested adapter.

    Raises:
        LoftqError: there is none.
    """
    if isinstance(adapter, bool):
        return find_adapter(name, source) if adapter else None
    folder = Path(adapter)
    for file in (CONFIG, WEIGHTS):
        if not (folder / Path(file).name).is_file():
            raise LoftqError(f"{folder} has no {Path(file).name}: give a folder that PEFT's save_pretrained wrote.")
    return folder


def _check_trained_on(name: str, adapter: Path, source: Mapping[str, Any], force: bool) -> None:
    """Raise if the adapter was trained on another conversion; with `force`, or if nothing tells, log a warning."""
    folder = Path(name)
    conversion = conversion_in(folder) if folder.is_dir() else conversion_on_hub(name, _start_on_hub(name, source))
    note = check_trained_on(conversion, adapter, force=force)
    if note is not None:
        logger.warning("%s.", note)


def _start_on_hub(name: str, source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a repository's starting adapter; empty if it has none."""
    from transformers.utils import cached_file

    found = cached_file(name, CONFIG, **source, _raise_exceptions_for_missing_entries=False)
    return {} if found is None else read_json(Path(found), "")


def _select(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _check_request(name: str, peft: bool, adapter: bool) -> None:
    """Check everything that can be checked before anything is loaded or downloaded.

    Args:
        peft: an adapter will be loaded: with `adapter` the initial one, otherwise one that is named.
    """
    folder = Path(name)
    if not folder.is_dir():
        _check_hub_id(name)
    if peft:
        _require("peft", "", "load the adapter")
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        if (folder / ".loftq").is_dir():
            raise LoftqError(f"the conversion in {folder} is unfinished: run the same `loftq quantize` command again.")
        raise LoftqError(f"{folder} is not a converted model: there is no config.json.")
    if adapter and not (folder / CONFIG).is_file():
        raise LoftqError(f"there is no adapter in {folder / FOLDER}: pass adapter=False to load the backbone alone.")
    if adapter:
        _check_same_conversion(folder)


def _check_hub_id(name: str) -> None:
    """Raise for what is no directory and cannot be a model on the Hub either, without asking the Hub."""
    from loftq_cli.checkpoint.remote.model import parse_model

    model = parse_model(name, None)
    if isinstance(model, Path):
        raise LoftqError(
            f"there is no directory {name}: give the output of `loftq quantize`, or org/name for a model on the Hub."
        )
    if model.revision is not None:
        raise LoftqError(f"{name} names a revision: load {model.repo} with revision={model.revision!r}.")


def _read_config(name: str, source: Mapping[str, Any], options: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = open_pretrained(
            AutoConfig, name, **source, **_select(options, ("trust_remote_code",))
        )
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise LoftqError(
            f"there is no directory {name}, and no model of that name could be opened on the Hub: check the name, the "
            "connection and `hf auth login`."
        ) from error
    return config


def _loading_of(folder: Path, config: PretrainedConfig) -> Loading:
    """Return how to load the container in `folder`, or on the Hub if there is no such folder."""
    container = container_in(folder) or container_of(_quant_method(config) or "")
    return PLAIN if container is None else container.loading


def _with_class_config(
    name: str,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    config: PretrainedConfig,
    model_class: Any,
    skip_list: str,
) -> dict[str, Any]:
    """Return options with a config for a class other than the converted one, if it needs another than transformers'.

    The class of one tower takes a sub-config, which lacks `quantization_config`; and layers that the converted class
    lacks or names differently must be in the skip list.

    Args:
        skip_list: field of `quantization_config`, as in `Loading`.
    """
    quantization = dict(_quantization(config))
    own_class = getattr(model_class, "config_class", None)
    own = config
    dense: tuple[str, ...] = ()
    if quantization and own_class is not None and not isinstance(config, own_class):
        own = open_pretrained(own_class, name, **source)
    if skip_list:
        listed = list(quantization.get(skip_list) or ())
        dense = other_dense_layers(model_class, config, own, listed)
        quantization[skip_list] = [*listed, *dense]
    if own is config and not dense:
        return dict(options)
    # Given a config, from_pretrained would pass these on to the model's constructor.
    fields = {key for key in options if key not in _NOT_CONFIG and hasattr(own, key)}
    for key in fields:
        setattr(own, key, options[key])
    own.quantization_config = quantization
    return {"config": own, **{key: value for key, value in options.items() if key not in fields}}


def _load_backbone(model_class: Any, name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    options = {**options, "output_loading_info": True}
    with _shapes_must_fit(model_class, name):
        model, info = open_pretrained(model_class, name, **options)
    lost = _lost_matrices(model, info["missing_keys"], info["unexpected_keys"])
    if lost:
        raise LoftqError(
            f"{len(lost)} packed matrices of {name} could not be loaded into {type(model).__name__} (the first: "
            f"'{lost[0]}'): convert the model again, or load it as the class in its config.json."
        )
    for container in FORMATS.values():  # all of them: a dense backbone may be quantized while it is loaded
        container.loading.finish(model)
    return model


@contextmanager
def _shapes_must_fit(model_class: Any, name: str) -> Iterator[None]:
    """Say in a sentence that weights have other shapes than the class, after transformers' own table of them."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise LoftqError(
            f"weights of {name} have other shapes than {getattr(model_class, '__name__', model_class)} builds from "
            "config.json: load the class named there, or give the sizes that differ, such as num_labels."
        ) from error


def _lost_matrices(model: nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Return the scales that a packed layer did not get, and those in the file whose layer exists but is not packed.

    Scales of a head that this class does not have are not counted."""
    modules = frozenset(path for path, _ in model.named_modules(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", "")
    lost = [key for key in missing if key.endswith(_LAYER_SCALES)]
    for key in unexpected:
        if key.endswith((*_LAYER_SCALES, *_TENSOR_SCALES)):
            module = next((key.removesuffix(end) for end in _TENSOR_SCALES if key.endswith(end)), key)
            module = next((module.removesuffix(name[7:]) for name in _LAYER_SCALES if module.endswith(name)), module)
            # The module of a weight, or of a stacked parameter.
            lost += [key] if find_path(module.rpartition(".")[0], modules, prefix) else []
    return sorted(lost)


def _model_class(config: PretrainedConfig, wanted: Any) -> Any:
    """Return the class to load with: the requested one, or else the one in config.json, or else AutoModel.

    Raises:
        LoftqError: transformers has no class of that name.
    """
    import transformers

    if isinstance(wanted, str):
        found = getattr(transformers, wanted, None)
        if not hasattr(found, "from_pretrained"):
            raise LoftqError(f"transformers {transformers.__version__} has no model class '{wanted}'.")
        return found
    if wanted is not None:
        return wanted
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    # Remote code: config.json maps Auto classes to classes of the repository.
    for auto_name, reference in (getattr(config, "auto_map", None) or {}).items():
        if str(reference).endswith(f".{architecture}"):
            return getattr(transformers, auto_name, transformers.AutoModel)
    return getattr(transformers, architecture, None) or transformers.AutoModel


def _quant_method(config: PretrainedConfig) -> str | None:
    found = _quantization(config).get("quant_method")
    return None if found is None else str(getattr(found, "value", found))


def _quantization(config: PretrainedConfig) -> Mapping[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, Mapping) else found.to_dict()


def _require(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise LoftqError(f"{module} is needed to {purpose}: run `{pip_install(extra)}`.")


def _check_same_conversion(folder: Path) -> None:
    """Compare the fingerprints in the files' metadata; files from the Hub are present only after loading."""
    ours, theirs = _fingerprints([folder / WEIGHTS]), _fingerprints(sorted(folder.glob("*.safetensors")))
    if ours and theirs and ours != theirs:
        raise LoftqError(
            f"adapter and backbone in {folder} come from different conversions, so together they are not the "
            "original model: run `loftq quantize` again."
        )


def _fingerprints(files: list[Path]) -> set[str]:
    from safetensors import safe_open

    found = set()
    for file in files:
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                found.add((opened.metadata() or {}).get(FINGERPRINT))
    return {item for item in found if item}
