"""recipe + headers → `Plan`: every unit of work and every output byte's place, before a weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

from loftq_cli.artifacts import adapter
from loftq_cli.artifacts.adapter import AdapterTarget
from loftq_cli.checkpoint import Checkpoint, SideFile, TensorInfo
from loftq_cli.checkpoint.base import fingerprint
from loftq_cli.checkpoint.scaled import quantization_of
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.files import TensorFile, lay_out, shard, shard_names
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, GridRequest, MatrixKind, OutputTensor, QuantizedMatrix, Refusal
from loftq_cli.modules import ModuleMap, TensorRole, map_modules
from loftq_cli.recipe import Recipe, parse_size, write_yaml
from loftq_cli.select import Decision, decide, unused_filters

INDEX = "model.safetensors.index.json"
_PACKED = (".qweight", ".weight_packed", ".SCB", ".absmax", ".W_q")  # names that only quantized weights have


@dataclass(frozen=True)
class Unit:
    """One tensor's way through: a matrix to quantize, or a tensor to copy.

    Attributes:
        matrix: None where the tensor is copied; `reason` then says why.
        target: the adapter it gets, if any.
        backbone, adapter: its output tensors.
    """

    source: TensorInfo
    module: str | None
    kind: str
    matrix: QuantizedMatrix | None
    reason: str
    target: AdapterTarget | None
    backbone: tuple[OutputTensor, ...]

    @property
    def tensor(self) -> str:
        return self.source.name

    @property
    def adapter(self) -> tuple[OutputTensor, ...]:
        return () if self.target is None else adapter.adapter_tensors(self.target)

    @property
    def adapter_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.adapter)

    @property
    def backbone_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.backbone)


@dataclass(frozen=True)
class Plan:
    """What `quantize` will do, complete: nothing in it depends on a weight's value.

    Attributes:
        recipe: the user's, with `format: auto` resolved.
        fingerprint: of recipe and source; stands in the backbone's and the adapter's metadata.
        files: the safetensors files, laid out; `texts`: every other file whose content is known now.
        moments: second moments of the layers' inputs, where the recipe asks for calibration and they are there.
    """

    recipe: Recipe
    source: Path
    output: Path
    fingerprint: str
    modules: ModuleMap
    dtype: torch.dtype
    units: tuple[Unit, ...]
    files: tuple[TensorFile, ...]
    texts: Mapping[str, bytes]
    side_files: tuple[SideFile, ...]
    notes: tuple[str, ...]
    moments: Path | None = None

    @cached_property
    def matrices(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.matrix is not None)

    @cached_property
    def kept(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.matrix is None)

    @property
    def source_bytes(self) -> int:
        return sum(unit.source.nbytes for unit in self.units)

    @property
    def backbone_bytes(self) -> int:
        return sum(unit.backbone_bytes for unit in self.units)

    @property
    def adapter_bytes(self) -> int:
        return sum(unit.adapter_bytes for unit in self.units)

    @property
    def quantized_weights(self) -> int:
        return sum(unit.matrix.weights for unit in self.matrices if unit.matrix)

    @property
    def bits_effective(self) -> float:
        """Bits of information a quantized weight takes: its code and its share of the scales."""
        return sum(unit.matrix.information_bits for unit in self.matrices if unit.matrix) / self.quantized_weights

    @property
    def bits_stored(self) -> float:
        """Bits a quantized weight takes in the output files, container overhead and all."""
        return 8 * sum(unit.backbone_bytes for unit in self.matrices) / self.quantized_weights


def make_plan(recipe: Recipe, checkpoint: Checkpoint, output: Path, version: str) -> Plan:
    """Decide everything that can be decided from headers.

    Raises:
        UsageError: the recipe asks for what the container cannot hold.
        LoftqError: the checkpoint cannot be converted.
    """
    _refuse_quantized(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    modules = _without_repeats(map_modules(checkpoint.config, shapes), checkpoint)
    decisions = {role.tensor: decide(role, checkpoint.tensors[role.tensor], recipe) for role in modules.roles}
    if not any(decision.bits for decision in decisions.values()):
        raise LoftqError(f"nothing in {checkpoint.path} is left to quantize: look at --include, --exclude and --rule.")
    notes = [*modules.notes, *_filter_notes(recipe, modules)]
    dtype = _model_dtype(recipe, checkpoint, decisions)
    recipe = dataclasses.replace(recipe, format=_resolve_format(recipe, modules, decisions))
    units = tuple(_unit(role, checkpoint, decisions[role.tensor], recipe, dtype) for role in modules.roles)
    if recipe.data_type != "uniform" and any(decision.bits == 8 for decision in decisions.values()):
        notes.append(f"'{recipe.codebook_type}' has no 8-bit codebook: 8-bit matrices take 'uniform' levels.")
    identity = recipe.fingerprint(f"{version} {_source_fingerprint(checkpoint, modules)}")
    files, weight_index = _lay_out_files(units, recipe, identity)
    texts = _texts(recipe, checkpoint, modules, units, dtype, output, weight_index)
    side = checkpoint.side_files()
    return Plan(recipe, checkpoint.path, output, identity, modules, dtype, units, files, texts, side, tuple(notes))


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    quantization = quantization_of(checkpoint.config)
    if quantization is None and not any(name.endswith(_PACKED) for name in checkpoint.tensors):
        return
    method = (quantization or {}).get("quant_method", "some method")
    name = checkpoint.config.get("_name_or_path")
    where = f", perhaps {name}" if name and Path(str(name)) != checkpoint.path else ""
    raise LoftqError(
        f"{checkpoint.path} is already quantized ({method}): give the full-precision model it was made from{where}."
    )


def _without_repeats(modules: ModuleMap, checkpoint: Checkpoint) -> ModuleMap:
    """Leave out tied weights that a pickle stores as a second view of the same memory; safetensors leave them out."""
    first: dict[object, str] = {}
    for name, info in checkpoint.tensors.items():
        first.setdefault((info.file, info.start, info.shape, info.dtype) if info.nbytes else name, name)
    unique = set(first.values())
    tied = {role.tensor for role in modules.roles if (role.keep or "").startswith("tied to ")}
    roles = tuple(role for role in modules.roles if role.tensor in unique or role.tensor not in tied)
    return dataclasses.replace(modules, roles=roles)


def _source_fingerprint(checkpoint: Checkpoint, modules: ModuleMap) -> str:
    """The checkpoint's own, or that of the same model without the repeats."""
    used = {role.tensor: checkpoint.tensors[role.tensor] for role in modules.roles}
    return checkpoint.fingerprint if len(used) == len(checkpoint.tensors) else fingerprint(checkpoint.config, used)


def _filter_notes(recipe: Recipe, modules: ModuleMap) -> list[str]:
    return [f"{text} matches no module of this model." for text in unused_filters(recipe, modules.roles)]


def _model_dtype(recipe: Recipe, checkpoint: Checkpoint, decisions: Mapping[str, Decision]) -> torch.dtype:
    """The dtype transformers will load the model in: the user's, the config's, or that of most weights."""
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch.")
    if named in DTYPES:
        return DTYPES[named]
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for name, decision in decisions.items():
        if decision.bits:
            bytes_by_dtype[checkpoint.tensors[name].dtype] += checkpoint.tensors[name].nbytes
    most = bytes_by_dtype.most_common(1)[0][0]
    return most if most in DTYPE_NAMES else torch.float32


def _resolve_format(recipe: Recipe, modules: ModuleMap, decisions: Mapping[str, Decision]) -> str:
    """`auto`: bitsandbytes where everything is 4-bit NF and no embedding is quantized, else `packed`."""
    if recipe.format != "auto":
        return recipe.format
    embedding = any(role.kind == "embedding" and decisions[role.tensor].bits for role in modules.roles)
    widths = {decision.bits for decision in decisions.values() if decision.bits}
    in_nf4 = recipe.codebook_type in ("nf", "nf4-subset")
    return "bnb" if widths == {4} and in_nf4 and not embedding else "packed"


def _unit(role: TensorRole, checkpoint: Checkpoint, decision: Decision, recipe: Recipe, dtype: torch.dtype) -> Unit:
    info = checkpoint.tensors[role.tensor]
    target = None
    if decision.rank:
        target = AdapterTarget(role.module or "", role.kind, *_oriented(role, info), decision.rank)
    matrix = _matrix(role, info, decision, recipe, dtype) if decision.bits else Refusal(decision.reason, fatal=False)
    if isinstance(matrix, QuantizedMatrix):
        return Unit(info, role.module, role.kind, matrix, "", target, get_format(recipe.format).tensors(matrix))
    cast_to = dtype if recipe.dtype != "auto" and info.dtype.is_floating_point else info.dtype
    copied = OutputTensor(info.name, cast_to, info.shape)
    # An adapter stays even where the container refuses the matrix: it starts at zero over the full-precision weight.
    return Unit(info, role.module, role.kind, None, matrix.reason, target, (copied,))


def _matrix(
    role: TensorRole, info: TensorInfo, decision: Decision, recipe: Recipe, dtype: torch.dtype
) -> QuantizedMatrix | Refusal:
    """The matrix on the container's grid, or why it stays dense; what the recipe could mend is a usage error."""
    kind, shape = cast("MatrixKind", role.kind), _oriented(role, info)
    request = GridRequest(kind, *shape, decision.bits, recipe.codebook_type, recipe.block_size, dtype)
    grid = get_format(recipe.format).grid(request)
    if not isinstance(grid, Refusal):
        return QuantizedMatrix(role.tensor, role.module or "", kind, *shape, grid)
    if grid.fatal:
        raise UsageError(f"{role.tensor} does not fit --format {recipe.format}: {grid.reason}.")
    return grid


def _oriented(role: TensorRole, info: TensorInfo) -> tuple[int, int]:
    """[out, in]; transformers' Conv1D stores [in, out]."""
    first, second = info.shape
    return (second, first) if role.kind == "conv1d" else (first, second)


def _lay_out_files(
    units: Sequence[Unit], recipe: Recipe, fingerprint: str
) -> tuple[tuple[TensorFile, ...], dict[str, str]]:
    """The files, and the index's tensor → shard map (empty for a single shard)."""
    metadata = {"format": "pt", "loftq_fingerprint": fingerprint}
    shards = shard((unit.backbone for unit in units), parse_size(recipe.max_shard_size))
    names = shard_names(len(shards))
    files = [lay_out(name, tensors, metadata) for name, tensors in zip(names, shards)]
    index = {tensor.name: name for name, tensors in zip(names, shards) for tensor in tensors}
    adapters = [tensor for unit in units for tensor in unit.adapter]
    if adapters:
        files.append(lay_out(adapter.WEIGHTS, adapters, metadata))
    return tuple(files), index if len(shards) > 1 else {}


def _texts(
    recipe: Recipe,
    checkpoint: Checkpoint,
    modules: ModuleMap,
    units: Sequence[Unit],
    dtype: torch.dtype,
    output: Path,
    index: Mapping[str, str],
) -> dict[str, bytes]:
    matrices = [unit.matrix for unit in units if unit.matrix is not None]
    packed = {matrix.module for matrix in matrices}
    dense_linears = [module for module in modules.linear_modules if module not in packed]
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "_name_or_path")}
    config["dtype"] = DTYPE_NAMES[dtype]
    quantization = get_format(recipe.format).quantization_config(matrices, dense_linears, dtype)
    if quantization is not None:
        config["quantization_config"] = quantization
    texts = {"config.json": _json(config), "loftq.yaml": write_yaml(recipe).encode()}
    if index:
        size = sum(unit.backbone_bytes for unit in units)
        texts[INDEX] = _json({"metadata": {"total_size": size}, "weight_map": index})
    targets = [unit.target for unit in units if unit.target is not None]
    if targets:
        texts[adapter.CONFIG] = _json(
            adapter.adapter_config(
                targets,
                modules.linear_modules,
                scaling=recipe.scaling,
                task_type=modules.task_type,
                base_model=str(output),
                # Only a dense Conv1D keeps its [in, out] orientation at run time.
                fan_in_fan_out=recipe.format == "dense" and any(t.kind == "conv1d" for t in targets),
            )
        )
    return texts


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
