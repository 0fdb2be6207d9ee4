"""Stage 3 of a plan: the units of work, one per tensor, or one per expert for tensors that stack experts."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from loftq_cli.checkpoint import TensorInfo
from loftq_cli.checkpoint.base import entry
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats import get_format
from loftq_cli.formats.adapter import AdapterTarget
from loftq_cli.formats.base import GridRequest, MatrixKind, QuantizedMatrix, Refusal, Request
from loftq_cli.modules.experts import Expert
from loftq_cli.modules.keep_rules import TABLES
from loftq_cli.modules.orientation import orientation_of
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.modules.roles import ModuleMap, TensorRole
from loftq_cli.numerics.grids.affine import ScaleRule
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.planning.checks import (
    calibration_notes,
    dense_experts,
    expert_notes,
    level_notes,
    rank_notes,
    refuse_nothing,
    refuse_together,
)
from loftq_cli.planning.choices import Choices
from loftq_cli.planning.select import Decision
from loftq_cli.planning.source import Source
from loftq_cli.planning.units import Unit
from loftq_cli.tensorfile.entry_names import expert_name
from loftq_cli.tensorfile.tensors import OutputTensor


@dataclass(frozen=True)
class WorkUnits:
    """All work of a conversion.

    Attributes:
        units: in the order of their tensors' names.
        request: the request for the whole output, completed now that the units are known.
        notes: sentences for the user.
    """

    units: tuple[Unit, ...]
    request: Request
    notes: tuple[str, ...]

    @property
    def matrices(self) -> tuple[QuantizedMatrix, ...]:
        return tuple(unit.matrix for unit in self.units if unit.matrix is not None)


def build_units(source: Source, choices: Choices) -> WorkUnits:
    """Give every matrix the container's grid and its adapter, in the order of the checkpoint.

    Raises:
        UsageError: the recipe asks for what the container cannot hold.
        LoftqError: the checkpoint lacks some of a layer's experts.
    """
    modules, decisions, recipe = source.modules, choices.decisions, choices.recipe
    _refuse_incomplete(modules)
    _check_experts_agree(modules, decisions)
    adapted = {role.parameter for role in modules.roles if role.expert is not None and decisions[role.tensor].rank}
    builder = _Builder(source, choices, _depths([name for name in modules.expert_parameters if name in adapted]))
    units = tuple(unit for role in modules.roles for unit in builder.units(role))
    request = dataclasses.replace(
        choices.request, dense_experts=dense_experts(units), kept_matrices=_kept_matrices(units)
    )
    notes = [
        *expert_notes(units, recipe),
        *calibration_notes(units, recipe),
        *level_notes(recipe, decisions),
        *rank_notes(units),
    ]
    work = WorkUnits(units, request, tuple(notes))
    refuse_together(work.matrices, recipe, request)
    refuse_nothing(units, recipe)
    return work


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the checkpoint before the container accepts or refuses it.

    Attributes:
        source: the tensor, or one expert's entry of it.
        name: path of its module; for an expert, its parameter and number.
        shape: [out, in].
        stacked: `source` is an entry of a tensor that stacks experts.
    """

    role: TensorRole
    source: TensorInfo
    name: str
    shape: tuple[int, int]
    expert: Expert | None
    stacked: bool

    @property
    def kind(self) -> MatrixKind:
        return cast("MatrixKind", self.role.kind)


@dataclass(frozen=True)
class _Builder:
    """Builds units; `depths` is the `Expert.depth` of every adapted parameter."""

    source: Source
    choices: Choices
    depths: Mapping[str, int]

    def units(self, role: TensorRole) -> Iterator[Unit]:
        """Yield one unit, or one per expert of a tensor that stacks experts and is not simply copied."""
        decision, expert = self.choices.decisions[role.tensor], role.expert
        if expert is not None:
            expert = dataclasses.replace(expert, depth=self.depths.get(role.parameter, 0))
        if expert is None or not expert.stacked or not (decision.bits or decision.rank):
            yield self.unit(self.matrix(role, expert, stacked=False), decision)
            return
        for index in range(expert.count):
            one = dataclasses.replace(expert, index=index)
            yield self.unit(self.matrix(role, one, stacked=True), decision)

    def matrix(self, role: TensorRole, expert: Expert | None, *, stacked: bool) -> _Matrix:
        info, name = self.source.checkpoint.tensors[role.tensor], role.module or ""
        if expert is not None:
            info = entry(info, expert.index) if stacked else info
            name = expert_name(name, expert.index, expert.part, expert.parts)
        # A tensor with another number of dimensions is copied, whatever its shape.
        shape = (info.shape[0], info.shape[1]) if len(info.shape) == 2 else (0, 0)
        return _Matrix(role, info, name, orientation_of(role.kind, expert).turn_shape(shape), expert, stacked)

    def unit(self, matrix: _Matrix, decision: Decision) -> Unit:
        container, role, source = get_format(self.choices.recipe.format), matrix.role, matrix.source
        target = self.target(matrix, decision.rank) if decision.rank else None
        quantized = self.quantized(matrix, decision)
        if isinstance(quantized, QuantizedMatrix):
            quantized = container.place(quantized, self.choices.request)
            copies = () if target is None else container.adapter_copies(quantized, target.rank)
            return Unit(source, role.module, role.kind, quantized, None, target, container.tensors(quantized), copies)
        # The adapter stays even if the container refuses the matrix: it starts at zero over the dense weight.
        return Unit(source, role.module, role.kind, None, quantized, target, (self.copied(matrix),))

    def copied(self, matrix: _Matrix) -> OutputTensor:
        """Return the output of a tensor that stays in full precision."""
        info, recipe = self.source.checkpoint.tensors[matrix.role.tensor], self.choices.recipe
        cast_it = recipe.dtype != "auto" and info.dtype.is_floating_point and recipe.dtype not in matrix.role.float32
        dtype = self.choices.dtype if cast_it else info.dtype
        whole = get_format(recipe.format).copied(OutputTensor(info.name, dtype, info.shape))
        return whole.piece(matrix.expert.index) if matrix.stacked and matrix.expert is not None else whole

    def target(self, matrix: _Matrix, rank: int) -> AdapterTarget:
        """Return the adapter of a matrix.

        Raises:
            UsageError: QA-LoRA was requested and the inputs cannot be pooled.
        """
        group, role, shape = self.choices.recipe.pooling, matrix.role, matrix.shape
        if group > 1 and role.parameter:
            raise UsageError(
                f"{role.tensor} becomes part of a stacked parameter, whose inputs PEFT cannot pool as --method qa-lora "
                f"needs: leave it out with --experts keep, or --exclude '{role.parameter}'."
            )
        if shape[1] % group:
            raise UsageError(
                f"{role.tensor} has rows of {shape[1]} elements, not a multiple of the group size {group} that "
                f"--method qa-lora pools over: choose another --group-size, or leave it out with --exclude "
                f"'{role.module}'."
            )
        rank = min(rank, shape[1] // group)
        return AdapterTarget(matrix.name, role.kind, *shape, rank, role.parameter, matrix.expert, group)

    def quantized(self, matrix: _Matrix, decision: Decision) -> QuantizedMatrix | Reason:
        """Return the matrix on the container's grid, or the reason to keep it in full precision.

        Raises:
            UsageError: another recipe would let the container hold it, or --experts require forbids to continue.
        """
        if decision.reason is not None:
            return decision.reason
        role, recipe = matrix.role, self.choices.recipe
        grid = self.grid(matrix, decision.bits)
        if not isinstance(grid, Refusal):
            return QuantizedMatrix(
                role.tensor, matrix.name, matrix.kind, *matrix.shape, grid, role.parameter, matrix.expert
            )
        if grid.fatal:
            raise UsageError(f"{role.tensor} does not fit --format {recipe.format}: {grid.reason}.")
        if matrix.kind == "expert" and recipe.experts == "require":
            raise UsageError(
                f"{role.tensor} cannot be quantized as --experts require asks: {grid.reason}; choose --format packed "
                "or --format dense."
            )
        return Reason(Why.REFUSED, found=grid.reason)

    def grid(self, matrix: _Matrix, bits: int) -> Grid | Refusal:
        """Return the container's grid for a matrix, or its refusal."""
        container = get_format(self.choices.recipe.format)
        if matrix.kind == "expert" and not container.holds_experts:
            return Refusal(
                f"{container.name} cannot hold experts, which transformers stacks in one parameter", fatal=False
            )
        if matrix.stacked and not container.holds_stacked_experts:
            return Refusal(
                f"{container.name} holds one expert at a time, and this checkpoint stores all of a layer in one tensor",
                fatal=False,
            )
        return container.grid(self.grid_request(matrix, bits))

    def grid_request(self, matrix: _Matrix, bits: int) -> GridRequest:
        recipe = self.choices.recipe
        return GridRequest(
            matrix.kind,
            *matrix.shape,
            bits,
            recipe.codebook_type,
            max(0, recipe.group_size) if recipe.group_size else recipe.block_size,
            self.choices.dtype,
            symmetric=recipe.symmetric,
            scale_rule=cast("ScaleRule", recipe.scale),
            double_quant=recipe.double_quant,
            unrounded=recipe.pooling > 1,
            module=matrix.role.module or "",
            parameter=bool(matrix.role.parameter),
        )


def _kept_matrices(units: Sequence[Unit]) -> tuple[str, ...]:
    """Return the names on disk, without `.weight`, of the matrices in full precision, except embeddings."""
    return tuple(
        unit.tensor.removesuffix(".weight")
        for unit in units
        if unit.matrix is None
        and unit.tensor.endswith(".weight")
        and len(unit.source.shape) == 2
        and unit.kind != "embedding"
        and not (unit.reason and unit.reason.why in (*TABLES, Why.CONVOLUTION, Why.NORM))
    )


def _depths(parameters: Sequence[str]) -> dict[str, int]:
    """Return `Expert.depth` by parameter: PEFT wraps a module once per targeted parameter, the last one outermost."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        by_module[name.rpartition(".")[0]].append(name)
    return {name: len(names) - 1 - i for names in by_module.values() for i, name in enumerate(names)}


def _check_experts_agree(modules: ModuleMap, decisions: Mapping[str, Decision]) -> None:
    chosen: dict[str, tuple[int, int]] = {}
    for role in modules.roles:
        if role.expert is not None:
            decision = decisions[role.tensor].bits, decisions[role.tensor].rank
            assert chosen.setdefault(role.parameter, decision) == decision, f"{role.parameter} has one grid and rank"


def _refuse_incomplete(modules: ModuleMap) -> None:
    """Refuse parameters with missing experts, whose adapter would have gaps.

    Raises:
        LoftqError: the checkpoint lacks some of a parameter's experts.
    """
    experts = [role for role in modules.roles if role.expert is not None and not role.expert.stacked]
    found = Counter(role.parameter for role in experts)
    for role in experts:
        assert role.expert is not None
        wanted = role.expert.count * role.expert.parts
        if found[role.parameter] != wanted:
            raise LoftqError(
                f"{role.parameter} consists of {wanted} matrices, but the checkpoint has {found[role.parameter]} of "
                "them: finish the download and try again."
            )
