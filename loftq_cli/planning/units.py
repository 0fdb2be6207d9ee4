"""Units of work: what becomes of every tensor of the checkpoint, and of every expert of those that stack experts."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from loftq_cli.checkpoint import Checkpoint, TensorInfo
from loftq_cli.checkpoint.base import entry, read_named
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.formats import adapter, get_container, get_format
from loftq_cli.formats.adapter import AdapterTarget
from loftq_cli.formats.base import GridRequest, MatrixKind, QuantizedMatrix, Refusal, Request
from loftq_cli.modules.experts import Expert
from loftq_cli.modules.roles import ModuleMap, TensorRole
from loftq_cli.numerics.grids.affine import ScaleRule
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.planning.select import Decision
from loftq_cli.recipe.model import Recipe
from loftq_cli.tensorfile.tensors import OutputTensor

UNWEIGHTED = ("embedding", "expert")  # kinds whose inputs calibration does not see


@dataclass(frozen=True)
class Unit:
    """One tensor's way through: a matrix to quantize, or a tensor to copy. Of a tensor that stacks experts every expert
    is a unit.

    Attributes:
        matrix: None where the tensor is copied; `reason` then says why.
        target: the adapter it gets, if any.
        source: the tensor, or the expert's entry of it, which has the expert's number in its name.
        backbone, adapter: its output tensors, or its pieces of them; `copies` are those of the adapter for other
            readers than PEFT.
    """

    source: TensorInfo
    module: str | None
    kind: str
    matrix: QuantizedMatrix | None
    reason: str
    target: AdapterTarget | None
    backbone: tuple[OutputTensor, ...]
    copies: tuple[OutputTensor, ...] = ()

    @property
    def tensor(self) -> str:
        return self.source.name

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its weights."""
        return read_named(checkpoint, self.tensor)

    @property
    def adapter(self) -> tuple[OutputTensor, ...]:
        return () if self.target is None else (*adapter.adapter_tensors(self.target), *self.copies)

    @property
    def adapter_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.adapter)

    @property
    def backbone_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.backbone)


@dataclass(frozen=True)
class _Maker:
    """What all units of a plan share."""

    checkpoint: Checkpoint
    recipe: Recipe
    dtype: torch.dtype
    request: Request
    depths: Mapping[str, int]

    def units(self, role: TensorRole, decision: Decision) -> Iterator[Unit]:
        """One unit, or one for every expert of a tensor that stacks them and is not simply copied."""
        info, expert = self.checkpoint.tensors[role.tensor], role.expert
        if expert is not None:
            expert = dataclasses.replace(expert, depth=self.depths.get(role.parameter, 0))
        if expert is None or not expert.stacked or not (decision.bits or decision.rank):
            yield self.unit(role, info, expert, decision)
            return
        for index in range(expert.count):
            yield self.unit(role, info, dataclasses.replace(expert, index=index), decision)

    def unit(self, role: TensorRole, info: TensorInfo, expert: Expert | None, decision: Decision) -> Unit:
        stacked = expert is not None and expert.stacked and bool(decision.bits or decision.rank)
        index = expert.index if expert is not None else 0
        source = entry(info, index) if stacked else info
        shape = _oriented(role, source)
        name = role.module or ""
        if expert is not None:
            name += f"[{expert.index}]" + (f".{expert.part}" if expert.parts > 1 else "")
        target = None
        if decision.rank:
            target = self.target(role, name, shape, decision.rank, expert)
        container, matrix = get_format(self.recipe.format), self.matrix(role, name, shape, expert, decision)
        if isinstance(matrix, QuantizedMatrix):
            matrix = container.place(matrix, self.request)
            copies = () if target is None else container.adapter_copies(matrix, target.rank)
            return Unit(source, role.module, role.kind, matrix, "", target, container.tensors(matrix), copies)
        floating = info.dtype.is_floating_point
        cast_to = self.dtype if self.recipe.dtype != "auto" and floating else info.dtype
        copied = container.copied(OutputTensor(info.name, cast_to, info.shape))
        output = copied.piece(index) if stacked else copied
        # An adapter stays even where the container refuses the matrix: it starts at zero over the dense weight.
        return Unit(source, role.module, role.kind, None, matrix.reason, target, (output,))

    def target(
        self, role: TensorRole, name: str, shape: tuple[int, int], rank: int, expert: Expert | None
    ) -> AdapterTarget:
        """The adapter of a matrix.

        Raises:
            UsageError: it cannot be pooled, which QA-LoRA needs.
        """
        group = self.recipe.pooling
        if group > 1 and role.parameter:
            raise UsageError(
                f"{role.tensor} becomes part of a stacked parameter, whose inputs PEFT cannot pool as --method qa-lora "
                f"needs: leave it out with --experts keep, or --exclude '{role.parameter}'."
            )
        if shape[1] % group:
            raise UsageError(
                f"{role.tensor} has rows of {shape[1]} elements, no whole number of groups of {group}, which --method "
                f"qa-lora pools over: choose another --group-size, or leave it out with --exclude '{role.module}'."
            )
        return AdapterTarget(name, role.kind, *shape, min(rank, shape[1] // group), role.parameter, expert, group)

    def matrix(
        self, role: TensorRole, name: str, shape: tuple[int, int], expert: Expert | None, decision: Decision
    ) -> QuantizedMatrix | Refusal:
        """The matrix on the container's grid, or why it stays dense; what the recipe could mend is a usage error."""
        if not decision.bits:
            return Refusal(decision.reason, fatal=False)
        recipe, kind = self.recipe, cast("MatrixKind", role.kind)
        grid = self._grid(role, shape, expert, decision)
        if not isinstance(grid, Refusal):
            return QuantizedMatrix(role.tensor, name, kind, *shape, grid, role.parameter, expert)
        if grid.fatal:
            raise UsageError(f"{role.tensor} does not fit --format {recipe.format}: {grid.reason}.")
        if kind == "expert" and recipe.experts == "require":
            raise UsageError(
                f"{role.tensor} cannot be quantized as --experts require asks: {grid.reason}; choose --format packed "
                "or --format dense."
            )
        return grid

    def _grid(
        self, role: TensorRole, shape: tuple[int, int], expert: Expert | None, decision: Decision
    ) -> Grid | Refusal:
        """The container's grid for a matrix [out, in], or why it has none."""
        recipe, kind = self.recipe, cast("MatrixKind", role.kind)
        request = GridRequest(
            kind,
            *shape,
            decision.bits,
            recipe.codebook_type,
            max(0, recipe.group_size) if recipe.group_size else recipe.block_size,
            self.dtype,
            symmetric=recipe.symmetric,
            scale_rule=cast("ScaleRule", recipe.scale),
            double_quant=recipe.double_quant,
            unrounded=recipe.pooling > 1,
            module=role.module or "",
            parameter=bool(role.parameter),
        )
        container = get_format(recipe.format)
        if kind == "expert" and not container.holds_experts:
            return Refusal(
                f"{container.name} holds no experts, which transformers stacks in one parameter", fatal=False
            )
        if expert is not None and expert.stacked and not container.holds_stacked_experts:
            return Refusal(
                f"{container.name} holds one expert at a time, and this checkpoint stores all of a layer in one tensor",
                fatal=False,
            )
        return container.grid(request)


def make_units(
    checkpoint: Checkpoint,
    modules: ModuleMap,
    decisions: Mapping[str, Decision],
    recipe: Recipe,
    dtype: torch.dtype,
    request: Request,
) -> tuple[Unit, ...]:
    """The units in the order of the checkpoint.

    Args:
        recipe: with its format resolved.
        dtype: the model's.
        request: what the container may ask about the whole.

    Raises:
        UsageError: the recipe asks for what the container cannot hold.
        LoftqError: the checkpoint lacks some of a layer's experts.
    """
    adapted = {role.parameter for role in modules.roles if role.expert is not None and decisions[role.tensor].rank}
    _check_complete(modules)
    alike: dict[str, tuple[int, int]] = {}
    for role in modules.roles:
        if role.expert is not None:
            chosen = decisions[role.tensor].bits, decisions[role.tensor].rank
            assert alike.setdefault(role.parameter, chosen) == chosen, f"{role.parameter} has one grid and one rank"
    maker = _Maker(
        checkpoint, recipe, dtype, request, _depths([name for name in modules.expert_parameters if name in adapted])
    )
    return tuple(unit for role in modules.roles for unit in maker.units(role, decisions[role.tensor]))


def expert_notes(units: Sequence[Unit], recipe: Recipe) -> list[str]:
    """What becomes of experts when the model is loaded, said before work starts."""
    quantized = [unit for unit in units if unit.kind == "expert" and unit.matrix is not None]
    if quantized and (text := get_container(recipe.format).loaded_experts):
        return [f"{len(quantized)} matrices of experts are {text}"]
    refused = [unit for unit in units if unit.kind == "expert" and unit.matrix is None and unit.target is not None]
    if refused and recipe.experts == "quantize" and not get_format(recipe.format).holds_stacked_experts:
        return [
            f"{len(refused)} matrices of experts stay in full precision, because {recipe.format} cannot hold them: "
            "--format packed or dense quantizes them, --experts require stops here instead."
        ]
    return []


def calibration_notes(units: Sequence[Unit], recipe: Recipe) -> list[str]:
    """Which quantized matrices calibration does not reach."""
    aside = [unit for unit in units if unit.kind in UNWEIGHTED and unit.matrix is not None]
    if recipe.calibrate is None or not aside:
        return []
    kinds = " and ".join(sorted({"experts" if unit.kind == "expert" else "embeddings" for unit in aside}))
    return [f"{len(aside)} matrices of {kinds} are fitted without weights: calibration sees inputs of linear layers."]


def dense_experts(units: Sequence[Unit]) -> tuple[str, ...]:
    """Tensors of single experts that stay in full precision."""
    return tuple(
        unit.tensor
        for unit in units
        if unit.kind == "expert" and unit.matrix is None and len(unit.source.shape) == 2 and not unit.backbone[0].whole
    )


def _depths(parameters: Sequence[str]) -> dict[str, int]:
    """PEFT wraps a module once for each targeted parameter in the module's order; the last one is outermost."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        by_module[name.rpartition(".")[0]].append(name)
    return {name: len(names) - 1 - i for names in by_module.values() for i, name in enumerate(names)}


def _check_complete(modules: ModuleMap) -> None:
    """Every expert of a parameter is in the checkpoint, else its adapter would have holes.

    Raises:
        LoftqError: some are not.
    """
    experts = [role for role in modules.roles if role.expert is not None and not role.expert.stacked]
    found = Counter(role.parameter for role in experts)
    for role in experts:
        assert role.expert is not None
        wanted = role.expert.count * role.expert.parts
        if found[role.parameter] != wanted:
            raise LoftqError(
                f"{role.parameter} is made of {wanted} matrices and the checkpoint holds {found[role.parameter]} of "
                "them: finish the download and try again."
            )


def _oriented(role: TensorRole, info: TensorInfo) -> tuple[int, int]:
    """[out, in] of a matrix; transformers' Conv1D and some experts are stored [in, out]."""
    if len(info.shape) != 2:
        return (0, 0)
    first, second = info.shape
    turned = role.kind == "conv1d" or (role.expert is not None and role.expert.transposed)
    return (second, first) if turned else (first, second)
