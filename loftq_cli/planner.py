"""recipe + headers → `Plan`: every unit of work and every output byte's place, before a weight is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from loftq_cli.artifacts import adapter
from loftq_cli.artifacts.adapter import AdapterTarget
from loftq_cli.checkpoint import Checkpoint, SideFile
from loftq_cli.checkpoint.base import fingerprint, name_order
from loftq_cli.checkpoint.scaled import quantization_of
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.files import TensorFile, lay_out, shard, shard_names
from loftq_cli.formats import get_format
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, OutputTensor, QuantizedMatrix, Request
from loftq_cli.modules import ModuleMap, map_modules
from loftq_cli.recipe import Recipe, parse_size, write_yaml
from loftq_cli.resolve import resolve
from loftq_cli.select import Decision, decide, unused_filters
from loftq_cli.units import Unit, calibration_notes, dense_experts, expert_notes, make_units

__all__ = ["INDEX", "Plan", "Unit", "make_plan"]

INDEX = "model.safetensors.index.json"
_SCRATCH = "scratch.safetensors"
_PACKED = (".qweight", ".weight_packed", ".SCB", ".absmax", ".W_q")  # names that only quantized weights have


@dataclass(frozen=True)
class Plan:
    """What `quantize` will do, complete: nothing in it depends on a weight's value.

    Attributes:
        recipe: the user's, with `format: auto` resolved.
        fingerprint: of recipe and model, the same for every kind of source; stands in the backbone's and the adapter's
            metadata.
        units: in the order of their tensors' names.
        files: the safetensors files, laid out; `texts`: every other file whose content is known now.
        nonfinite: matrices left alone because of what they hold, with the reason.
        scratch: what units leave for others until the end (`joint_adapters`); None where nothing is.
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
    scratch: TensorFile | None
    texts: Mapping[str, bytes]
    side_files: tuple[SideFile, ...]
    notes: tuple[str, ...]
    nonfinite: Mapping[str, str]
    moments: Path | None = None

    @property
    def written_files(self) -> tuple[TensorFile, ...]:
        """What units write: the output's files, and the scratch."""
        return (*self.files, self.scratch) if self.scratch else self.files

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

    @cached_property
    def joint_adapters(self) -> Mapping[OutputTensor, tuple[AdapterTarget, ...]]:
        """lora_B tensors that several units have a share in."""
        found: dict[OutputTensor, list[AdapterTarget]] = {}
        for unit in self.units:
            joint = adapter.joint_b(unit.target) if unit.target else None
            if joint is not None and unit.target is not None:
                found.setdefault(joint, []).append(unit.target)
        return {joint: tuple(targets) for joint, targets in found.items()}

    @property
    def adapter_bytes(self) -> int:
        return sum(tensor.nbytes for file in self.files if file.name == adapter.WEIGHTS for tensor in file.tensors)

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


def find_modules(checkpoint: Checkpoint) -> ModuleMap:
    """What every tensor of a checkpoint is.

    Raises:
        LoftqError: it is quantized already, or does not belong to its config.json.
    """
    _refuse_quantized(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return _without_repeats(map_modules(checkpoint.config, shapes), checkpoint)


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    output: Path,
    version: str,
    nonfinite: Mapping[str, str] | None = None,
    modules: ModuleMap | None = None,
) -> Plan:
    """Decide everything that can be decided from headers.

    Args:
        nonfinite: matrices that hold NaN or infinity, by tensor, with the reason to leave them alone; None where no
            weight was read.
        modules: where they have been found already.

    Raises:
        UsageError: the recipe asks for what the container cannot hold.
        LoftqError: the checkpoint cannot be converted.
    """
    modules = modules or find_modules(checkpoint)
    _refuse_unsound(checkpoint, modules, recipe)
    decisions = {role.tensor: decide(role, checkpoint.tensors[role.tensor], recipe) for role in modules.roles}
    decisions |= _spoiled(modules, nonfinite or {})
    if not any(decision.bits for decision in decisions.values()):
        raise LoftqError(f"nothing in {checkpoint.path} is left to quantize: look at --include, --exclude and --rule.")
    notes = [
        *modules.notes,
        *_missing_notes(modules),
        *_filter_notes(recipe, modules),
        *_nonfinite_notes(recipe, nonfinite),
    ]
    dtype = _model_dtype(recipe, checkpoint, decisions)
    recipe = resolve(recipe, modules, decisions)
    side = checkpoint.side_files()
    tokenizer = next((file.read for file in side if file.name == "tokenizer.json"), None)
    request = Request(modules.task_type, recipe.dequantize, checkpoint.config, tokenizer)
    refuse_together((), recipe, request)
    units = tuple(make_units(checkpoint, modules, decisions, recipe, dtype, request))
    request = dataclasses.replace(request, dense_experts=dense_experts(units))
    refuse_together([unit.matrix for unit in units if unit.matrix is not None], recipe, request)
    _refuse_nothing(units, recipe)
    notes += [*expert_notes(units, recipe), *calibration_notes(units, recipe)]
    if recipe.data_type in ("nf", "nf-sym") and any(decision.bits == 8 for decision in decisions.values()):
        notes.append(f"'{recipe.codebook_type}' has no 8-bit codebook: 8-bit matrices take 'uniform' levels.")
    identity = recipe.fingerprint(f"{version} {_source_fingerprint(checkpoint, modules)}")
    files, scratch, weight_index = _lay_out_files(units, recipe, identity, request)
    texts = _texts(recipe, checkpoint, modules, units, request, dtype, output, weight_index)
    return Plan(
        recipe,
        checkpoint.path,
        output,
        identity,
        modules,
        dtype,
        units,
        files,
        scratch,
        texts,
        side,
        tuple(notes),
        dict(nonfinite or {}),
    )


def refuse_together(matrices: Sequence[QuantizedMatrix], recipe: Recipe, request: Request) -> None:
    """What the container cannot hold as a whole: the model (no matrices yet), or these matrices in one file."""
    reason = get_format(recipe.format).refuse(matrices, request)
    if reason is not None:
        raise UsageError(f"this model does not fit --format {recipe.format}: {reason}.")


def _refuse_nothing(units: Sequence[Unit], recipe: Recipe) -> None:
    """A container that holds none of the matrices that were asked for."""
    if not any(unit.matrix is not None for unit in units):
        reasons = {unit.reason for unit in units if unit.target is not None}
        raise UsageError(
            f"this model has nothing that fits --format {recipe.format} ({'; '.join(sorted(reasons))}): use --format "
            "packed or --format dense."
        )


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


def _refuse_unsound(checkpoint: Checkpoint, modules: ModuleMap, recipe: Recipe) -> None:
    """Without a model class matrices are chosen by name only where the user chooses them; and a model of which layers
    are missing is damaged. Heads and poolers may be missing: transformers starts them anew."""
    if modules.architecture is None and not recipe.include:
        raise LoftqError(
            f"{checkpoint.path}: {modules.notes[0].split(': matrices were chosen')[0]}; check config.json or upgrade "
            "transformers, or give --include '*' to choose matrices by name and shape."
        )
    lost = [name for name in modules.missing if re.search(r"\.\d+\.", name)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise LoftqError(
            f"{checkpoint.path} lacks {lost[0]}{more}, which {modules.architecture} built from config.json has: finish "
            "the download, or check that config.json belongs to these weights."
        )


def _without_repeats(modules: ModuleMap, checkpoint: Checkpoint) -> ModuleMap:
    """Leave out tied weights that a pickle stores as a second view of the same memory; safetensors leave them out. The
    rest stands in the order of names, however the source has it."""
    first: dict[object, str] = {}
    tables = {role.tensor for role in modules.roles if role.tied}
    for name, info in checkpoint.tensors.items():
        place = (info.file, info.start, info.shape, info.dtype) if info.nbytes else name
        first[place] = name if name in tables else first.get(place, name)
    unique = set(first.values())
    tied = {role.tensor for role in modules.roles if (role.keep or "").startswith("tied to ")}
    roles = [role for role in modules.roles if role.tensor in unique or role.tensor not in tied]
    # A table that is stored a second time, under its twin's name, must stay what the twin is.
    twice = any((role.keep or "").startswith("tied to ") and role.kind in ("head", "embedding") for role in roles)
    again = [dataclasses.replace(role, keep=f"tied to {role.tied}") if role.tied and twice else role for role in roles]
    return dataclasses.replace(modules, roles=tuple(sorted(again, key=lambda role: name_order(role.tensor))))


def _source_fingerprint(checkpoint: Checkpoint, modules: ModuleMap) -> str:
    """The checkpoint's own, or that of the same model without the repeats."""
    used = {role.tensor: checkpoint.tensors[role.tensor] for role in modules.roles}
    return checkpoint.fingerprint if len(used) == len(checkpoint.tensors) else fingerprint(checkpoint.config, used)


def _missing_notes(modules: ModuleMap) -> list[str]:
    return [f"the checkpoint has no {name}: transformers will start it at random." for name in modules.missing]


def _filter_notes(recipe: Recipe, modules: ModuleMap) -> list[str]:
    return [f"{text} matches no module of this model." for text in unused_filters(recipe, modules.roles)]


def _spoiled(modules: ModuleMap, nonfinite: Mapping[str, str]) -> dict[str, Decision]:
    """Tensors that stay in full precision for NaN or infinity; experts of a layer are packed together or not at all."""
    found = {name: Decision(0, 0, reason) for name, reason in nonfinite.items()}
    experts = [role for role in modules.roles if role.expert is not None]
    for name, reason in nonfinite.items():
        whole = name.partition("[")[0]
        parameters = {role.parameter for role in experts if role.tensor == whole}
        beside = Decision(0, 0, f"stacked with {name}, which {reason}")
        found |= {role.tensor: found.get(role.tensor, beside) for role in experts if role.parameter in parameters}
    return found


def _nonfinite_notes(recipe: Recipe, nonfinite: Mapping[str, str] | None) -> list[str]:
    if nonfinite:
        return [f"{name} {reason} and stays in full precision." for name, reason in nonfinite.items()]
    if recipe.allow_nonfinite and nonfinite is None:
        return ["no weight was read: a matrix that holds NaN or infinity will stay in full precision."]
    return []


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


def _lay_out_files(
    units: Sequence[Unit], recipe: Recipe, fingerprint: str, request: Request
) -> tuple[tuple[TensorFile, ...], TensorFile | None, dict[str, str]]:
    """The files, what is needed only while work is under way, and the index's tensor → shard map (empty for a single
    shard)."""
    metadata = {"format": "pt", "loftq_fingerprint": fingerprint}
    matrices = [unit.matrix for unit in units if unit.matrix is not None]
    backbone = [tensor for unit in units for tensor in unit.backbone]
    container = get_format(recipe.format)
    adapter_files, scratch = _adapter_files(units, recipe, metadata, request)
    single = container.container(backbone, matrices, request, fingerprint)
    if single is not None:
        return (single, *adapter_files), scratch, {}
    shards = shard((unit.backbone for unit in units), parse_size(recipe.max_shard_size))
    names = shard_names(len(shards))
    files = [lay_out(name, tensors, metadata) for name, tensors in zip(names, shards)]
    index = {tensor.name: file.name for file in files for tensor in file.tensors}
    return (*files, *adapter_files), scratch, index if len(shards) > 1 else {}


def _adapter_files(
    units: Sequence[Unit], recipe: Recipe, metadata: Mapping[str, str], request: Request
) -> tuple[list[TensorFile], TensorFile | None]:
    """Files of adapters, and what is needed only while work is under way."""
    adapters, apart = [], []
    for unit in units:
        if unit.target is None:
            continue
        joint = adapter.joint_b(unit.target)
        first, second = adapter.adapter_tensors(unit.target)
        adapters += [first, joint or second]
        apart += [second] if joint else []
    files = [lay_out(adapter.WEIGHTS, adapters, metadata)] if adapters else []
    copies = [tensor for unit in units for tensor in unit.copies]
    other = get_format(recipe.format).copies_container(copies, request, recipe.rank) if copies else None
    return files if other is None else [*files, other], lay_out(_SCRATCH, apart, metadata) if apart else None


def _texts(
    recipe: Recipe,
    checkpoint: Checkpoint,
    modules: ModuleMap,
    units: Sequence[Unit],
    request: Request,
    dtype: torch.dtype,
    output: Path,
    index: Mapping[str, str],
) -> dict[str, bytes]:
    matrices = [unit.matrix for unit in units if unit.matrix is not None]
    packed = {matrix.module for matrix in matrices}
    dense_linears = [module for module in modules.linear_modules if module not in packed]
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "_name_or_path")}
    config["dtype"] = DTYPE_NAMES[dtype]
    quantization = get_format(recipe.format).quantization_config(matrices, dense_linears, dtype, request)
    if quantization is not None and quantization["quant_method"] in modules.rebuilt_for:
        raise UsageError(
            f"transformers builds {modules.architecture} with other modules for {quantization['quant_method']} than "
            "this checkpoint is made for: choose --format packed or --format dense."
        )
    if quantization is not None:
        config["quantization_config"] = quantization
    texts = {"config.json": _json(config), "loftq.yaml": write_yaml(recipe).encode()}
    if index:
        size = sum(unit.backbone_bytes for unit in units)
        texts[INDEX] = index_text(size, index)
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


def index_text(size: int, index: Mapping[str, str]) -> bytes:
    """model.safetensors.index.json: `size` bytes of tensors, and the shard of each."""
    return _json({"metadata": {"total_size": size}, "weight_map": index})


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
