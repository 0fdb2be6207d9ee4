"""From a budget to widths and ranks matrix by matrix: a recipe in, the same recipe with one exact rule a matrix out.

The rules are what makes a mixed conversion repeatable: `loftq.yaml` holds them, and a recipe that gives every matrix
its width already is left as it is, so nothing is measured again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loftq_cli.budget.allocation import Choices, RankChoice, allocate, allocate_ranks
from loftq_cli.budget.measure import Curve, Measurements, Probe
from loftq_cli.checkpoint import Checkpoint
from loftq_cli.errors import UsageError
from loftq_cli.formats.adapter import WEIGHTS
from loftq_cli.formats.base import Request
from loftq_cli.machine.memory import free_memory
from loftq_cli.machine.precision import full_precision
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.planning.checks import refuse_together
from loftq_cli.planning.plan import Plan, make_plan
from loftq_cli.planning.resolve import with_container
from loftq_cli.planning.units import Unit
from loftq_cli.recipe.model import BITS, PAPER_WIDTHS, Recipe, exact_rule, parse_size

_TOLERANCE = 0.005  # of the budget: how far the result may stay from it without a word
_RANK_REACH = 4  # times the mean rank is the most one matrix gets
_LAYER = re.compile(r"(.*?)(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Mixed:
    """The recipe with its rules, and what the user should hear about it."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A matrix to quantize: the unit of work it would be at each width that its container holds and its rule allows."""

    widths: Mapping[int, Unit]
    rank_given: bool

    @property
    def unit(self) -> Unit:
        return next(iter(self.widths.values()))

    @property
    def weights(self) -> int:
        assert self.unit.matrix is not None
        return self.unit.matrix.weights

    @property
    def probe(self) -> Probe:
        return Probe(self.unit.source, {width: unit.matrix for width, unit in self.widths.items() if unit.matrix})

    def at(self, width: int) -> Candidate:
        """The same with its width settled."""
        return Candidate({width: self.widths[width]}, self.rank_given)


@dataclass(frozen=True)
class Field:
    """All candidates, and the bytes of the backbone that do not depend on their widths."""

    candidates: tuple[Candidate, ...]
    other_bytes: int

    @property
    def weights(self) -> int:
        return sum(candidate.weights for candidate in self.candidates)

    @property
    def settled(self) -> bool:
        return all(len(candidate.widths) == 1 for candidate in self.candidates)

    def mean(self) -> float:
        """Bits a weight, once every width is settled."""
        bits = sum(next(iter(candidate.widths)) * candidate.weights for candidate in self.candidates)
        return bits / self.weights

    def settle(self, widths: Sequence[int]) -> Field:
        taken = tuple(candidate.at(width) for candidate, width in zip(self.candidates, widths))
        return Field(taken, self.other_bytes)


@full_precision()
def mix(
    recipe: Recipe,
    checkpoint: Checkpoint,
    modules: ModuleMap,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    nonfinite: Mapping[str, str] | None = None,
) -> Mixed:
    """Allocate what the recipe leaves to a budget. Reads weights, one matrix at a time, only where it has to.

    Raises:
        UsageError: the budget cannot be met.
        LoftqError: a weight cannot be read, or is not finite.
    """
    if not recipe.allocates:
        return Mixed(recipe)
    field = _field(recipe, checkpoint, modules, nonfinite)
    ranks_open = recipe.rank_budget is not None and not all(c.rank_given for c in field.candidates)
    if field.settled and not ranks_open:
        return Mixed(recipe, _notes(recipe, field))
    origin = f"{recipe.model}@{recipe.revision}" if recipe.revision else str(checkpoint.path)
    measured = Measurements(checkpoint, origin, device, progress)
    if not field.settled:
        field = field.settle(_paper(recipe, field) if recipe.mix == "paper" else _optimal(recipe, field, measured))
    ranks = _ranks(recipe, field, measured) if ranks_open else None
    measured.save()
    free_memory(device)
    return Mixed(_with_rules(recipe, field, ranks), _notes(recipe, field))


def _field(recipe: Recipe, checkpoint: Checkpoint, modules: ModuleMap, nonfinite: Mapping[str, str] | None) -> Field:
    """Plan the model once at every width; what the container refuses at a width is no choice.

    Raises:
        UsageError: the container refuses every width.
    """
    allowed = (PAPER_WIDTHS if recipe.mix == "paper" else BITS) if recipe.mix else (int(recipe.bits),)
    form = _container(recipe)
    plans: dict[int, Plan] = {}
    refused: UsageError | None = None
    for width in sorted(allowed):
        uniform = dataclasses.replace(recipe, bits=width, mix="", target_size=None, rank_budget=None, format=form)
        try:
            plans[width] = make_plan(uniform, checkpoint, Path(), "", nonfinite, modules)
        except UsageError as error:
            refused = error
    if not plans:
        assert refused is not None
        raise refused
    _refuse_mixture(dataclasses.replace(recipe, format=form), plans, checkpoint, modules)
    widths: dict[str, dict[int, Unit]] = {}
    for plan in plans.values():
        for unit in plan.matrices:
            assert unit.matrix is not None
            widths.setdefault(unit.tensor, {}).setdefault(unit.matrix.grid.bits, unit)
    candidates = tuple(Candidate(found, _rank_given(recipe, found)) for found in widths.values())
    _refuse_experts(candidates, recipe)
    widest = plans[max(plans)]  # its headers are the longest
    other = sum(unit.backbone_bytes for unit in widest.units if unit.tensor not in widths)
    headers = sum(len(file.header) for file in widest.files if file.name != WEIGHTS)
    return Field(candidates, other + headers)


def _refuse_experts(candidates: Sequence[Candidate], recipe: Recipe) -> None:
    """
    Raises:
        UsageError: experts that share a parameter, and with it a grid and a rank, would have to be told apart.
    """
    for candidate in candidates:
        open_rank = recipe.rank_budget is not None and not candidate.rank_given
        if candidate.unit.kind == "expert" and (len(candidate.widths) > 1 or open_rank):
            raise UsageError(
                f"the experts of {candidate.unit.module} share a width and a rank, which a budget cannot spread: give "
                "them both with --rule, such as --rule 'experts=2:16', and the budget goes to the rest."
            )


def _refuse_mixture(recipe: Recipe, plans: Mapping[int, Plan], checkpoint: Checkpoint, modules: ModuleMap) -> None:
    """Ask the container about two widths at once before anything is measured.

    Raises:
        UsageError: it holds one width only.
    """
    if len(plans) > 1:
        both = [plan.matrices[0].matrix for plan in (plans[min(plans)], plans[max(plans)])]
        request = Request(modules.task_type, recipe.dequantize, checkpoint.config)
        refuse_together([matrix for matrix in both if matrix is not None], recipe, request)


def _rank_given(recipe: Recipe, widths: Mapping[int, Unit]) -> bool:
    unit = next(iter(widths.values()))
    rule = next((rule for rule in recipe.rules if rule.matches(unit.module or "")), None)
    return unit.target is None or (rule is not None and rule.rank is not None)


def _optimal(recipe: Recipe, field: Field, measured: Measurements) -> list[int]:
    """The widths with the least summed squared error under the budget."""
    curves = measured.curves([candidate.probe for candidate in field.candidates])
    measured.save()
    items = [_choices(recipe, candidate, curve) for candidate, curve in zip(field.candidates, curves)]
    found = allocate(items, _budget(recipe, field))
    if found is None:
        raise UsageError(_too_small(recipe, field))
    return [list(candidate.widths)[option] for candidate, option in zip(field.candidates, found.taken)]


def _choices(recipe: Recipe, candidate: Candidate, curve: Curve) -> Choices:
    """Squared error of every width, relative to the matrix and weighted by its size, or as it is."""
    scale = _scale(recipe, candidate, curve.norm)
    costs = tuple(scale * curve.residuals[width] ** 2 for width in candidate.widths)
    return Choices(tuple(_size(recipe, candidate, width) for width in candidate.widths), costs)


def _size(recipe: Recipe, candidate: Candidate, width: int) -> int:
    """What a width takes of the budget: bytes in the file, or bits of code."""
    return candidate.weights * width if recipe.target_size is None else candidate.widths[width].backbone_bytes


def _budget(recipe: Recipe, field: Field) -> int:
    if recipe.target_size is None:
        return int(recipe.bits * field.weights + 1e-6)
    return parse_size(recipe.target_size) - field.other_bytes


def _too_small(recipe: Recipe, field: Field) -> str:
    least = sum(min(_size(recipe, c, width) for width in c.widths) for c in field.candidates)
    if recipe.target_size is None:
        return (
            f"--bits {recipe.bits:g} is below the least mean there can be, {least / field.weights:.2f}: raise it, or "
            "drop rules with more bits."
        )
    need = (least + field.other_bytes) / 1e9
    return (
        f"--target-size {recipe.target_size} is too small: the backbone takes at least {need:.3f}GB "
        f"({field.other_bytes / 1e9:.3f}GB of it stays in full precision); raise it, or drop rules with more bits."
    )


def _paper(recipe: Recipe, field: Field) -> list[int]:
    """The first layers at 4 bits, the rest at 2 (LoftQ section 4; with 32 layers, 2.25 bits are the first four).

    A layer is an entry of a numbered list of modules; of several lists (encoder and decoder) each gives its share.
    """
    high, low = PAPER_WIDTHS
    layers = [_layer(candidate.unit.module or "") for candidate in field.candidates]
    counts: dict[str, int] = {}
    for layer in layers:
        if layer is not None:
            counts[layer[0]] = max(counts.get(layer[0], 0), layer[1] + 1)
    if not counts:
        raise UsageError("--mix paper needs numbered layers, which this model has not: use --mix optimal.")

    def widths(share: float) -> list[int]:
        # A tie goes to the smaller model.
        first = {stack: -int(-(share * count - 0.5) // 1) for stack, count in counts.items()}
        wanted = [high if layer is not None and layer[1] < first[layer[0]] else low for layer in layers]
        return [w if w in c.widths else next(iter(c.widths)) for w, c in zip(wanted, field.candidates)]

    if recipe.target_size is None:
        return widths((recipe.bits - low) / (high - low))
    budget, most = _budget(recipe, field), max(counts.values())
    for count in range(most, -1, -1):
        taken = widths(count / most)
        if sum(_size(recipe, c, width) for c, width in zip(field.candidates, taken)) <= budget:
            return taken
    raise UsageError(_too_small(recipe, field))


def _layer(module: str) -> tuple[str, int] | None:
    """`model.layers.3.mlp.up_proj` → (`model.layers`, 3); None outside numbered lists."""
    match = _LAYER.match(module)
    return (match[1], int(match[2])) if match else None


def _ranks(recipe: Recipe, field: Field, measured: Measurements) -> list[int]:
    """Ranks by what each further one takes off the error, so that the adapters are as large as at the mean rank."""
    assert recipe.rank_budget is not None
    reach = max(1, round(_RANK_REACH * recipe.rank_budget))
    open_ones = [candidate for candidate in field.candidates if not candidate.rank_given]
    probes = [candidate.probe for candidate in open_ones]
    norms = [curve.norm for curve in measured.curves(probes)]
    spectra = measured.spectra(probes, reach)
    items = [
        RankChoice(tuple(_scale(recipe, candidate, norm) * value**2 for value in spectrum), _adapter_size(candidate))
        for candidate, norm, spectrum in zip(open_ones, norms, spectra)
    ]
    found = iter(allocate_ranks(items, int(recipe.rank_budget * sum(item.size for item in items))))
    return [_rank(candidate) if candidate.rank_given else next(found) for candidate in field.candidates]


def _scale(recipe: Recipe, candidate: Candidate, norm: float) -> float:
    """What a relative squared error counts."""
    return float(candidate.weights) if recipe.weigh == "relative" else norm**2


def _adapter_size(candidate: Candidate) -> int:
    """Parameters of one rank."""
    assert candidate.unit.matrix is not None
    return sum(candidate.unit.matrix.shape)


def _rank(candidate: Candidate) -> int:
    return candidate.unit.target.rank if candidate.unit.target else 0


def _with_rules(recipe: Recipe, field: Field, ranks: Sequence[int] | None) -> Recipe:
    """Exact rules first, so that they win; what rules were there goes on saying what is skipped or kept dense."""
    rules = []
    for i, candidate in enumerate(field.candidates):
        given = _rank(candidate) if candidate.rank_given else None
        rank = given if ranks is None else ranks[i]
        # An embedding without an adapter has no rank to give.
        rank = rank if candidate.unit.target is not None else None
        rules.append(exact_rule(candidate.unit.module or "", next(iter(candidate.widths)), rank))
    return dataclasses.replace(recipe, rule=(*rules, *recipe.rule), format=_container(recipe))


def _container(recipe: Recipe) -> str:
    """The recipe's, or one that holds every width where widths are mixed and the choice is left to us."""
    return with_container(recipe, BITS).format if recipe.mix else recipe.format


def _notes(recipe: Recipe, field: Field) -> tuple[str, ...]:
    """A mean that is not the one asked for is said."""
    if not recipe.mix or recipe.target_size is not None:
        return ()
    mean = field.mean()
    if abs(mean - recipe.bits) <= _TOLERANCE * recipe.bits:
        return ()
    return (f"the mean is {mean:.3f} bits, not {recipe.bits:g}: {_why_off(recipe)}.",)


def _why_off(recipe: Recipe) -> str:
    if recipe.mix == "paper":
        return "whole layers at 4 bits give no nearer one"
    return "rules give matrices their widths, or matrices are too few to come nearer"
