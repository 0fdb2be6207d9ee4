"""Plugin that lets `from_pretrained` read packed checkpoints: `quant_method: loftq` in transformers' registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq_cli._version import pip_install
from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES
from loftq_cli.formats.packed import CONFIG_VERSION, QUANT_METHOD, SCALE_NAMES
from loftq_cli.modules.keep_rules import PLAIN_LINEAR_CLASSES
from loftq_cli.modules.view import float32_patterns
from loftq_cli.modules.weight_reads import ReadKind, partial_weight_reads
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import TRELLIS, Codebook
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.grids.trellis import TrellisGrid
from loftq_cli.numerics.grids.trellis_tables import TABLE_NUMBER, has_table
from loftq_cli.runtime.linear import LoftqEmbedding, LoftqLinear, PackedWeight
from loftq_cli.runtime.paths import find_path, moved_prefixes
from loftq_cli.runtime.unpacking import PackedParameter, Unpacking
from loftq_cli.runtime.weight_dtype import DtypeLinear, renaming


@dataclass(frozen=True)
class PackedGroup:
    """The modules that share a grid, with the paths of the class that the checkpoint was converted with. `parameters`
    are dequantized when they are loaded."""

    grid: Grid
    modules: tuple[str, ...]
    parameters: tuple[PackedParameter, ...] = ()


class LoftqConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint, as `PackedFormat.quantization_config` writes it.

    Raises:
        LoftqError: written by a newer loftq, or a field is missing or makes no sense.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        dtype: str = "float32",
        version: int = CONFIG_VERSION,
        **others: Any,
    ) -> None:
        # `to_dict` returns every attribute, so fields that this version does not know survive a round trip.
        self.__dict__.update(others)
        self.quant_method: Any = QUANT_METHOD
        self.version, self.dtype, self.groups = version, dtype, [dict(group) for group in groups]
        if version > CONFIG_VERSION:
            raise LoftqError(
                f"this checkpoint has packed layout version {version} and this loftq reads up to {CONFIG_VERSION}: "
                f"run `{pip_install(upgrade=True)}`."
            )
        self.packed_groups()

    def packed_groups(self) -> list[PackedGroup]:
        """Return the groups as typed objects."""
        try:
            return [_packed_group(group, DTYPES[self.dtype]) for group in self.groups]
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise LoftqError(
                f"the quantization_config in config.json is damaged ({type(error).__name__}: {error}): download or "
                "convert the checkpoint again."
            ) from error


def _packed_group(group: Mapping[str, Any], value_dtype: torch.dtype) -> PackedGroup:
    scale_dtype = DTYPES[group["scale_dtype"]]
    if group["data_type"] in TRELLIS:
        trellis = TrellisGrid(
            int(group["bits"]), int(group["state_bits"]), int(group["block_size"]), scale_dtype, value_dtype
        )
        if group["table"] != TABLE_NUMBER or not has_table(trellis.bits, trellis.state_bits):
            raise LoftqError(
                f"this checkpoint has table {group['table']} of {trellis.bits} and {trellis.state_bits} bits, "
                f"which this loftq lacks: run `{pip_install(upgrade=True)}`."
            )
        return _group_of(trellis, group)
    if group["data_type"] == "int":
        integers = AffineGrid(
            int(group["bits"]),
            int(group["group_size"]),
            group["zero"],
            scale_dtype,
            DTYPES[group["value_dtype"]] if "value_dtype" in group else value_dtype,
            zero_dtype=DTYPES[group["zero_dtype"]],
        )
        assert integers.zero in ("none", "float"), f"zero is {integers.zero!r}"
        return PackedGroup(integers, tuple(group["modules"]))
    book = Codebook(str(group["data_type"]), int(group["bits"]), tuple(float(level) for level in group["levels"]))
    grid = BlockGrid(book, int(group["block_size"]), "rows", scale_dtype=scale_dtype, value_dtype=value_dtype)
    return _group_of(grid, group)


def _group_of(grid: BlockGrid | TrellisGrid, group: Mapping[str, Any]) -> PackedGroup:
    parameters = [
        PackedParameter(name, grid, int(entry["in_features"]), bool(entry["transposed"]))
        for name, entry in group.get("parameters", {}).items()
    ]
    return PackedGroup(grid, tuple(group["modules"]), tuple(parameters))


class LoftqHfQuantizer(HfQuantizer):
    """Replaces the listed modules by packed ones before transformers reads any weight."""

    # Packed models are made by `loftq quantize`, not while loading.
    requires_calibration = True

    quantization_config: LoftqConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        pack_modules(model, self.quantization_config.packed_groups())
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Extend transformers' weight conversions so that experts are unpacked before they are stacked."""
        parameters = [item for group in self.quantization_config.packed_groups() for item in group.parameters]
        present, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
        moved = moved_prefixes(model, (item.name for item in parameters))
        names = [find_path(item.name, present, prefix, moved) or item.name for item in parameters]
        parameters = [replace(item, name=name) for item, name in zip(parameters, names)]
        self._unpacking = Unpacking(parameters, prefix, self)
        renamed = renaming((path for path, module in model.named_modules() if isinstance(module, DtypeLinear)), prefix)
        return self._unpacking.extend([*weight_conversions, *([] if renamed is None else [renamed])])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        # These parameters are dense in the model now and would be saved dense.
        for group in self.quantization_config.groups:
            group["parameters"] = {}
        model._weight_conversions = self._unpacking.restore(model._weight_conversions)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales and levels keep the dtype they are stored in, whatever the model is loaded in."""
        if any(name.endswith(SCALE_NAMES) for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        # `config.dtype` is a string if it was read from config.json.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        unpack_modules(model, dtype or torch.get_default_dtype())
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def is_packable(module: nn.Module) -> bool:
    """True if a packed layer computes the same as this module.

    A subclass with its own forward may scale its result or use `weight` directly, which packed layers cannot follow.
    `nn.MultiheadAttention` uses its output layer's weight directly.
    """
    kind = type(module)
    if isinstance(module, nn.Embedding):
        return kind.forward is nn.Embedding.forward and module.max_norm is None
    if isinstance(module, nn.Linear):
        plain = kind.forward is nn.Linear.forward or kind.__name__ in PLAIN_LINEAR_CLASSES
        return plain and kind is not nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(module, Conv1D)


def pack_modules(model: nn.Module, groups: Sequence[PackedGroup]) -> None:
    """Replace the groups' modules, and those tied to them, by empty packed ones. Modules that this class does not have
    (such as a head) are skipped.

    Raises:
        LoftqError: none of the modules exists, or one is of a kind that cannot be packed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", "")
    moved = moved_prefixes(model, (f"{path}.weight" for group in groups for path in group.modules))
    grids: dict[str, Grid] = {}
    for group in groups:
        for path in group.modules:
            found = find_path(path, modules, prefix, moved)
            if found is not None:
                grids[found] = group.grid
    if any(group.modules for group in groups) and not grids:
        raise LoftqError(
            f"none of the packed modules of this checkpoint is in {type(model).__name__}: load it as the class in its "
            "config.json, or as another class of the same family, or convert the model again with --include for the "
            "layers of this class, which are in full precision here."
        )
    owners: dict[str, str] = {}
    for tied_paths in _tied_modules(model):
        listed = next((path for path in tied_paths if path in grids), None)
        if listed is not None:
            owners |= {path: listed for path in tied_paths if path not in grids}
            grids |= dict.fromkeys(tied_paths, grids[listed])
    shared = {path for tied_paths in _tied_modules(model) for path in tied_paths}
    read = partial_weight_reads(model, ReadKind.DTYPE).keys() - shared
    for path, grid in grids.items():
        weight_dtype = dense_dtype(model, path, modules[path].weight.dtype) if path in read else None
        model.set_submodule(path, _packed_module(path, modules[path], grid, weight_dtype))
    for path, owner in owners.items():
        tied, packed = model.get_submodule(path), model.get_submodule(owner)
        assert isinstance(tied, PackedWeight) and isinstance(packed, PackedWeight)
        tied.use_scales_of(packed)


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module by its dense equivalent, also inside LoRA layers; tied modules stay tied."""
    modules = list(model.named_modules(remove_duplicate=False))
    adapted = any(name.endswith(".base_layer") for name, _ in modules)
    dense: dict[int, nn.Module] = {}
    weights: dict[int, Any] = {}
    for path, module in modules:
        if not isinstance(module, PackedWeight):
            continue
        if id(module) not in dense:
            new = dense[id(module)] = _dense_module(module, dense_dtype(model, path, dtype))
            new.weight = weights.setdefault(id(module.stored_codes), new.weight)
            # A wrapped backbone stays frozen; a bare one is as trainable as a newly loaded model.
            new.train(module.training).weight.requires_grad_(not adapted)
        new = dense[id(module)]
        model.set_submodule(path, new)
        if path.endswith(".base_layer") and isinstance(new, Conv1D):
            # The adapter was made for a linear layer; PEFT's merge takes the weight's orientation from this attribute.
            lora: Any = model.get_submodule(path.removesuffix(".base_layer"))
            lora.fan_in_fan_out = True


def _tied_modules(model: nn.Module) -> list[list[str]]:
    """Return groups of modules that share one weight."""
    groups: dict[str, list[str]] = {}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        if target.endswith(".weight") and source.endswith(".weight"):
            groups.setdefault(source, [source.removesuffix(".weight")]).append(target.removesuffix(".weight"))
    return list(groups.values())


def dense_dtype(model: nn.Module, path: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a layer's dense weight if transformers loads the model in `dtype`: float32 for some."""
    patterns = float32_patterns(model) if isinstance(model, PreTrainedModel) else {}
    pattern = patterns.get(DTYPE_NAMES.get(dtype, ""))
    name = f"{path.removesuffix('.base_layer')}.weight"
    return torch.float32 if pattern is not None and pattern.search(name) else dtype


def _packed_module(path: str, module: nn.Module, grid: Grid, weight_dtype: torch.dtype | None = None) -> PackedWeight:
    """Return the packed layer; `weight_dtype` for a model whose code reads the dtype of the weight."""
    if not is_packable(module):
        raise LoftqError(
            f"'{path}' is a {type(module).__name__}, which cannot run on packed weights: convert the model again with "
            f"--rule '{path}=skip'."
        )
    weight: Any = module.weight
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(module, nn.Embedding):
        return LoftqEmbedding(
            module.num_embeddings, module.embedding_dim, grid, padding_idx=module.padding_idx, **place
        )
    conv1d = isinstance(module, Conv1D)
    n_in, n_out = weight.shape if conv1d else reversed(weight.shape)
    features = n_in, n_out, module.bias is not None, grid
    if weight_dtype is None:
        return LoftqLinear(*features, conv1d=conv1d, **place)
    return DtypeLinear(*features, conv1d=conv1d, weight_dtype=weight_dtype, **place)


def _dense_module(module: PackedWeight, dtype: torch.dtype) -> nn.Module:
    """Return the dense equivalent, on the device that the module computes on."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return module.dense(dtype)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import align_module_device

    with align_module_device(module):
        dense = module.dense(dtype)
    # Offloaded codes become weights in memory, so the hook only has to move inputs.
    device = getattr(hook, "execution_device", None)
    return add_hook_to_module(dense, AlignDevicesHook(device, io_same_device=getattr(hook, "io_same_device", False)))


def register() -> None:
    """Register `quant_method: loftq` with transformers; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LoftqConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LoftqHfQuantizer)


register()
