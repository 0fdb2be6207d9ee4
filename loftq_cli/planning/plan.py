"""Make a `Plan` from recipe and headers: every unit of work and the place of every output byte, without any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from loftq_cli.checkpoint import Checkpoint, SideFile
from loftq_cli.formats import adapter
from loftq_cli.formats.adapter import AdapterTarget
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.planning.build_units import build_units
from loftq_cli.planning.choices import choose
from loftq_cli.planning.output_files import INDEX, index_text, lay_out_output
from loftq_cli.planning.source import find_modules, read_source
from loftq_cli.planning.units import Unit
from loftq_cli.recipe.model import Recipe
from loftq_cli.tensorfile.tensors import OutputTensor, TensorFile

__all__ = ["INDEX", "Plan", "Unit", "find_modules", "index_text", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Everything that `quantize` will do; nothing in it depends on a weight's value.

    Attributes:
        recipe: the user's, with every `auto` resolved.
        fingerprint: of recipe and model, the same for every kind of source; written into the metadata of the backbone
            and the adapter.
        units: in the order of their tensors' names.
        files: the safetensors files, laid out; `texts`: every other file whose content is known now.
        nonfinite: for every matrix that stays in full precision because of it, the first number that is not finite and
            its place, by tensor.
        scratch: file for results of units that are merged at the end (`joint_adapters`); None if there is none.
        moments: second moments of the layers' inputs, if the recipe asks for calibration and they are available.
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
        """Return all files that units write: the output's files and the scratch file."""
        return (*self.files, self.scratch) if self.scratch else self.files

    @cached_property
    def matrices(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.matrix is not None)

    @property
    def grids(self) -> set[Grid]:
        """Return the grids of all matrices."""
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
        """Return the lora_B tensors that several units share, with the targets of those units."""
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
        """Return the bits of information per quantized weight: its code and its share of the scales."""
        return sum(unit.matrix.information_bits for unit in self.matrices if unit.matrix) / self.quantized_weights

    @property
    def bits_stored(self) -> float:
        """Return the bits per quantized weight in the output files, including the container's overhead."""
        return 8 * sum(unit.backbone_bytes for unit in self.matrices) / self.quantized_weights


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    output: Path,
    version: str,
    nonfinite: Mapping[str, str] | None = None,
    modules: ModuleMap | None = None,
) -> Plan:
    """Plan a conversion from headers alone, in four stages: the source, the choices for every tensor, the units of work
    in the container, and the layout of the output.

    Args:
        version: of loftq.
        nonfinite: as in `choices.choose`.
        modules: from `find_modules`, if already known.

    Raises:
        UsageError: the recipe asks for what the container cannot hold.
        LoftqError: the checkpoint cannot be converted.
    """
    source = read_source(recipe, checkpoint, modules)
    choices = choose(recipe, source, nonfinite)
    work = build_units(source, choices)
    layout = lay_out_output(source, choices, work, output, version)
    return Plan(
        recipe=choices.recipe,
        source=checkpoint.path,
        output=output,
        fingerprint=layout.fingerprint,
        modules=source.modules,
        dtype=choices.dtype,
        units=work.units,
        files=layout.files,
        scratch=layout.scratch,
        texts=layout.texts,
        side_files=source.side_files,
        notes=(*source.notes, *choices.notes, *work.notes),
        nonfinite=choices.nonfinite,
    )
