"""recipe + headers → `Plan`: every unit of work and every output byte's place, before a weight is read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from loftq_cli.checkpoint import Checkpoint, SideFile
from loftq_cli.checkpoint.base import fingerprint, name_order
from loftq_cli.errors import LoftqError
from loftq_cli.formats import adapter
from loftq_cli.formats.adapter import AdapterTarget
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, Request
from loftq_cli.modules.roles import ModuleMap, map_modules
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.planning.checks import (
    level_notes,
    refuse_nothing,
    refuse_quantized,
    refuse_together,
    refuse_unsound,
    source_notes,
)
from loftq_cli.planning.output_files import INDEX, index_text, lay_out_files, output_texts
from loftq_cli.planning.resolve import resolve
from loftq_cli.planning.select import Decision, decide
from loftq_cli.planning.units import Unit, calibration_notes, dense_experts, expert_notes, make_units
from loftq_cli.recipe.model import Recipe
from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile

__all__ = ["INDEX", "Plan", "Unit", "find_modules", "index_text", "make_plan", "refuse_together"]


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

    @property
    def grids(self) -> set[Grid]:
        """Those of all matrices."""
        return {unit.matrix.grid for unit in self.units if unit.matrix is not None}

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
    refuse_quantized(checkpoint)
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
    refuse_unsound(checkpoint, modules, recipe)
    decisions = _decisions(recipe, checkpoint, modules, nonfinite or {})
    notes = source_notes(recipe, modules, nonfinite)
    dtype = _model_dtype(recipe, checkpoint, decisions)
    recipe = resolve(recipe, modules, decisions)
    side = checkpoint.side_files()
    tokenizer = next((file.read for file in side if file.name == "tokenizer.json"), None)
    request = Request(modules.task_type, recipe.dequantize, checkpoint.config, tokenizer)
    refuse_together((), recipe, request)
    units = tuple(make_units(checkpoint, modules, decisions, recipe, dtype, request))
    request = dataclasses.replace(request, dense_experts=dense_experts(units))
    refuse_together([unit.matrix for unit in units if unit.matrix is not None], recipe, request)
    refuse_nothing(units, recipe)
    notes += [*expert_notes(units, recipe), *calibration_notes(units, recipe), *level_notes(recipe, decisions)]
    identity = recipe.fingerprint(f"{version} {_source_fingerprint(checkpoint, modules)}")
    files, scratch, index = lay_out_files(units, recipe, identity, request)
    texts = output_texts(recipe, checkpoint.config, modules, units, request, dtype, output, index)
    path, told, left = checkpoint.path, tuple(notes), dict(nonfinite or {})
    return Plan(recipe, path, output, identity, modules, dtype, units, files, scratch, texts, side, told, left)


def _decisions(
    recipe: Recipe, checkpoint: Checkpoint, modules: ModuleMap, nonfinite: Mapping[str, str]
) -> dict[str, Decision]:
    """What becomes of every tensor, by name."""
    decisions = {role.tensor: decide(role, checkpoint.tensors[role.tensor], recipe) for role in modules.roles}
    decisions |= _spoiled(modules, nonfinite)
    if not any(decision.bits for decision in decisions.values()):
        raise LoftqError(f"nothing in {checkpoint.path} is left to quantize: look at --include, --exclude and --rule.")
    return decisions


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
