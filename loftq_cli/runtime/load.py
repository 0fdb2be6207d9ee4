"""Backbone and adapter in one call, for every container and every Auto class."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LoftqError
from loftq_cli.formats.adapter import CONFIG, FOLDER, WEIGHTS
from loftq_cli.formats.gguf.format import FILE as GGUF_FILE
from loftq_cli.formats.packed import SCALE_NAMES
from loftq_cli.runtime.adapter import attach_adapter, find_adapter
from loftq_cli.runtime.paths import find_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

FINGERPRINT = "loftq_fingerprint"

# Names of the scales in packed and in bitsandbytes checkpoints.
_PACKED_SCALES = tuple(f".{name}" for name in SCALE_NAMES)
_SCALES = (*_PACKED_SCALES, ".absmax")

# What reads a checkpoint of a quant_method: modules and the extra they come with.
_LOADERS = {
    "bitsandbytes": (("bitsandbytes", "bnb"),),
    "gptq": (("optimum", "gptq"), ("gptqmodel", "gptq")),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
}

# What from_pretrained takes that concerns where files come from; PEFT and AutoConfig need the same.
_SOURCE_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_PLACEMENT_OPTIONS = ("device_map", "max_memory")


def load(
    path: str | PathLike[str],
    *,
    trainable: bool = False,
    adapter: bool | str | PathLike[str] = True,
    auto_class: Any = None,
    **from_pretrained_kwargs: Any,
) -> nn.Module:
    """Load what `loftq quantize` wrote: the backbone, and around it the adapter.

    Args:
        path: the output directory, or the Hub id it was pushed to.
        trainable: leave the adapter trainable (and, in a classifier, its head).
        adapter: False gives the bare backbone; a path, the adapter saved there after training.
        auto_class: a transformers Auto class or model class, or the name of one. By default the class in config.json.
        from_pretrained_kwargs: passed on to `from_pretrained` (`dtype`, `device_map`, `revision`, `token`, ...).

    Returns:
        A `peft.PeftModel`, or with `adapter=False` the transformers model.

    Raises:
        LoftqError: the conversion is unfinished, a library is missing, backbone and adapter do not belong together,
            or some weight found no place.
    """
    from loftq_cli.runtime.quantizer import register

    register()
    name, options = str(path), from_pretrained_kwargs
    source, placement = _picked(options, _SOURCE_OPTIONS), _picked(options, _PLACEMENT_OPTIONS)
    _check_request(Path(path), adapter is True)
    config = _read_config(name, source, options)
    _check_packed_state(name, config, options.get("quantization_config"), adapter is not False)
    home = _adapter_home(name, adapter, source)
    if home is not None:
        options = {**_trainable_kernel(config), **options}
    if (Path(path) / GGUF_FILE).is_file():
        options = {"gguf_file": GGUF_FILE, "dtype": config.dtype, **options}
    model = _load_backbone(_model_class(config, auto_class), name, options)
    if home is None:
        return model
    if adapter is True:
        _check_same_conversion(home.parent)
    return attach_adapter(model, home, trainable=trainable, placement=placement)


def _adapter_home(name: str, adapter: bool | str | PathLike[str], source: Mapping[str, Any]) -> Path | None:
    """The folder of the adapter that was asked for.

    Raises:
        LoftqError: there is none, or PEFT is missing.
    """
    if isinstance(adapter, bool):
        return find_adapter(name, source) if adapter else None
    _require("peft", "train", "load the adapter")
    folder = Path(adapter)
    for file in (CONFIG, WEIGHTS):
        if not (folder / Path(file).name).is_file():
            raise LoftqError(f"{folder} holds no {Path(file).name}: give a folder that PEFT's save_pretrained wrote.")
    return folder


def _picked(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _check_request(folder: Path, adapter: bool) -> None:
    """What can be refused before anything is loaded or downloaded."""
    if adapter:
        _require("peft", "train", "load the adapter")
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        if (folder / ".loftq").is_dir():
            raise LoftqError(f"the conversion in {folder} is unfinished: run the same `loftq quantize` command again.")
        raise LoftqError(f"{folder} holds no converted model: there is no config.json.")
    if adapter and not (folder / CONFIG).is_file():
        raise LoftqError(f"there is no adapter in {folder / FOLDER}: pass adapter=False to load the backbone alone.")
    if adapter:
        _check_same_conversion(folder)


def _read_config(name: str, source: Mapping[str, Any], options: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **source, **_picked(options, ("trust_remote_code",)))
    for module, extra in _LOADERS.get(_quant_method(config) or "", ()):
        _require(module, extra, "read this checkpoint")
    return config


def _check_packed_state(name: str, config: PretrainedConfig, given: Any, adapter: bool) -> None:
    """What compressed-tensors checkpoints cannot do in the state they load in: PEFT adapts unpacked layers only, and
    transformers unpacks all of them at the width of the first.

    Args:
        given: the user's own `quantization_config`, whose `dequantize` wins over the file's.

    Raises:
        LoftqError: an adapter over packed layers, or several widths to unpack.
    """
    if _quant_method(config) != "compressed-tensors":
        return
    quantization = _quantization(config)
    unpacked = quantization.get("dequantize", False) if given is None else getattr(given, "dequantize", False)
    groups = (quantization.get("config_groups") or {}).values()
    # Experts have a group of their own, which transformers looks up for them.
    several = sum(not any("experts" in target for target in group["targets"]) for group in groups) > 1
    if unpacked and several:
        raise LoftqError(
            f"transformers would unpack the several bit widths of {name} as if they were one: load it as it is with "
            "adapter=False, or convert with --format packed to train."
        )
    if adapter and not unpacked:
        way = "quantization_config=transformers.CompressedTensorsConfig(dequantize=True)"
        raise LoftqError(
            f"{name} stays packed when it is loaded (--compressed), and PEFT adapts unpacked layers only: "
            + ("convert with --format packed to train" if several else f"pass {way}")
            + ", or adapter=False for the backbone alone."
        )


def _trainable_kernel(config: PretrainedConfig) -> dict[str, Any]:
    """GPTQ's fastest kernel is for inference only; an adapter needs one with gradients."""
    if _quant_method(config) != "gptq":
        return {}
    from transformers import GPTQConfig

    return {"quantization_config": GPTQConfig(bits=_quantization(config)["bits"], backend="auto_trainable")}


def _load_backbone(model_class: Any, name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    options = {**options, "output_loading_info": True}
    model, info = model_class.from_pretrained(name, **options)
    lost = _lost_matrices(model, info["missing_keys"], info["unexpected_keys"])
    if lost:
        raise LoftqError(
            f"{len(lost)} packed matrices of {name} found no place in {type(model).__name__} (the first: '{lost[0]}'): "
            "convert the model again, or load it as the class in its config.json."
        )
    for module in model.modules():
        # One inference pass would repack bitsandbytes weights for AVX-512 in place, and training after it is wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _lost_matrices(model: nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Scales that a packed layer did not get, and scales in the file whose layer is there but not packed. Those of a
    head that this class does not have are no loss."""
    modules = frozenset(path for path, _ in model.named_modules(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", "")
    lost = [key for key in missing if key.endswith(_PACKED_SCALES)]
    for key in unexpected:
        if key.endswith(_SCALES):
            module = key.removesuffix(".absmax")
            module = next((module.removesuffix(name[7:]) for name in _PACKED_SCALES if module.endswith(name)), module)
            # A weight's module, or the module that holds a stacked parameter.
            lost += [key] if find_path(module.rpartition(".")[0], modules, prefix) else []
    return sorted(lost)


def _model_class(config: PretrainedConfig, wanted: Any) -> Any:
    """The class to load with: the one asked for, or the one in config.json, or AutoModel.

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
    # Remote code: config.json says which Auto class stands for which class of the repository.
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
        raise LoftqError(f"{module} is needed to {purpose}: run `pip install 'loftq-cli[{extra}]'`.")


def _check_same_conversion(folder: Path) -> None:
    """Compare the fingerprints in the files' metadata; from the Hub the backbone's files are there after loading."""
    ours, theirs = _fingerprints([folder / WEIGHTS]), _fingerprints(sorted(folder.glob("*.safetensors")))
    if ours and theirs and ours != theirs:
        raise LoftqError(
            f"adapter and backbone in {folder} come from different conversions, so together they are not the model "
            "that was converted: run `loftq quantize` again."
        )


def _fingerprints(files: list[Path]) -> set[str]:
    from safetensors import safe_open

    found = set()
    for file in files:
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                found.add((opened.metadata() or {}).get(FINGERPRINT))
    return {item for item in found if item}
