"""Turn a budget into widths and ranks: return the recipe with one exact rule per matrix.

The rules make a mixed conversion repeatable: `loftq.yaml` holds them, and a recipe that already sets the width of every
matrix is not changed and needs no measurements.
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
from loftq_cli.machine.sizes import size_text
from loftq_cli.modules.roles import ModuleMap
from loftq_cli.planning.checks import refuse_together
from loftq_cli.planning.plan import Plan, make_plan
from loftq_cli.planning.resolve import with_container
from loftq_cli.planning.units import Unit
from loftq_cli.recipe.model import BITS, PAPER_WIDTHS, Recipe, exact_rule, parse_size

_TOLERANCE = 0.005  # relative deviation from the budget that needs no note
_RANK_REACH = 4  # the largest rank of a matrix, as a multiple of the mean rank
_LAYER = re.compile(r"(.*?)(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Mixed:
    """The recipe with its rules, and notes for the user."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A matrix to quantize: its unit of work at each width that the container can hold and the matrix's rule allows."""

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

    def with_width(self, width: int) -> Candidate:
        """Return the candidate with a fixed width."""
        return Candidate({width: self.widths[width]}, self.rank_given)


@dataclass(frozen=True)
class Candidates:
    """All candidates, and the size of the rest of the backbone, which does not depend on their widths."""

    candidates: tuple[Candidate, ...]
    other_bytes: int

    @property
    def weights(self) -> int:
        return sum(candidate.weights for candidate in self.candidates)

    @property
    def widths_known(self) -> bool:
        return all(len(candidate.widths) == 1 for candidate in self.candidates)

    def mean(self) -> float:
        """Return the bits per weight, once every width is fixed."""
        bits = sum(next(iter(candidate.widths)) * candidate.weights for candidate in self.candidates)
        return bits / self.weights

    def with_widths(self, widths: Sequence[int]) -> Candidates:
        taken = tuple(candidate.with_width(width) for candidate, width in zip(self.candidates, widths))
        return Candidates(taken, self.other_bytes)


@full_precision()
def mix(
    recipe: Recipe,
    checkpoint: Checkpoint,
    modules: ModuleMap,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    nonfinite: Mapping[str, str] | None = None,
) -> Mixed:
    """Allocate the widths and ranks that the recipe leaves to a budget. Reads weights only if needed.

    Raises:
        UsageError: the budget cannot be met.
        LoftqError: a weight cannot be read, or is not finite.
    """
    if not recipe.allocates:
        return Mixed(recipe)
    options = _find_candidates(recipe, checkpoint, modules, nonfinite)
    ranks_open = recipe.rank_budget is not None and not all(c.rank_given for c in options.candidates)
    if options.widths_known and not ranks_open:
        return Mixed(recipe, _notes(recipe, options))
    origin = f"{recipe.model}@{recipe.revision}" if recipe.revision else str(checkpoint.path)
    measured = Measurements(checkpoint, origin, device, progress)
    if not options.widths_known:
        options = options.with_widths(
            _paper(recipe, options) if recipe.mix == "paper" else _optimal(recipe, options, measured)
        )
    ranks = _ranks(recipe, options, measured) if ranks_open else None
    measured.save()
    free_memory(device)
    return Mixed(_with_rules(recipe, options, ranks), _notes(recipe, options))


def _find_candidates(
    recipe: Recipe, checkpoint: Checkpoint, modules: ModuleMap, nonfinite: Mapping[str, str] | None
) -> Candidates:
    """Plan the model once at every width; widths that the container refuses are not options.

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
    return Candidates(candidates, other + headers)


def _refuse_experts(candidates: Sequence[Candidate], recipe: Recipe) -> None:
    """
    Raises:
        UsageError: experts that share a parameter, and thus a grid and a rank, would need different ones.
    """
    for candidate in candidates:
        open_rank = recipe.rank_budget is not None and not candidate.rank_given
        if candidate.unit.kind == "expert" and (len(candidate.widths) > 1 or open_rank):
            raise UsageError(
                f"the experts of {candidate.unit.module} share one width and one rank, which a budget cannot allocate: "
                "set both with --rule, such as --rule 'experts=2:16', and the budget applies to the rest."
            )


def _refuse_mixture(recipe: Recipe, plans: Mapping[int, Plan], checkpoint: Checkpoint, modules: ModuleMap) -> None:
    """Check that the container can hold two widths at once before anything is measured.

    Raises:
        UsageError: it can hold only one width.
    """
    if len(plans) > 1:
        both = [plan.matrices[0].matrix for plan in (plans[min(plans)], plans[max(plans)])]
        request = Request(modules.task_type, recipe.dequantize, checkpoint.config)
        refuse_together([matrix for matrix in both if matrix is not None], recipe, request)


def _rank_given(recipe: Recipe, widths: Mapping[int, Unit]) -> bool:
    unit = next(iter(widths.values()))
    rule = next((rule for rule in recipe.rules if rule.matches(unit.module or "")), None)
    return unit.target is None or (rule is not None and rule.rank is not None)


def _optimal(recipe: Recipe, options: Candidates, measured: Measurements) -> list[int]:
    """Return the widths with the least total squared error under the budget."""
    if _least(recipe, options) > _budget(recipe, options):
        raise UsageError(_too_small(recipe, options))
    curves = measured.curves([candidate.probe for candidate in options.candidates])
    measured.save()
    items = [_choices(recipe, candidate, curve) for candidate, curve in zip(options.candidates, curves)]
    found = allocate(items, _budget(recipe, options))
    assert found is not None, "the narrowest widths fit"
    return [list(candidate.widths)[option] for candidate, option in zip(options.candidates, found.taken)]


def _choices(recipe: Recipe, candidate: Candidate, curve: Curve) -> Choices:
    """Return the squared error of every width, either absolute, or relative to the matrix and weighted by its size."""
    scale = _scale(recipe, candidate, curve.norm)
    costs = tuple(scale * curve.residuals[width] ** 2 for width in candidate.widths)
    return Choices(tuple(_size(recipe, candidate, width) for width in candidate.widths), costs)


def _size(recipe: Recipe, candidate: Candidate, width: int) -> int:
    """Return the cost of a width in units of the budget: bytes in the file, or bits of the codes."""
    return candidate.weights * width if recipe.target_size is None else candidate.widths[width].backbone_bytes


def _budget(recipe: Recipe, options: Candidates) -> int:
    if recipe.target_size is None:
        return int(recipe.bits * options.weights + 1e-6)
    return parse_size(recipe.target_size) - options.other_bytes


def _least(recipe: Recipe, options: Candidates) -> int:
    """Return the cost of the narrowest width of every matrix."""
    return sum(min(_size(recipe, c, width) for width in c.widths) for c in options.candidates)


def _too_small(recipe: Recipe, options: Candidates) -> str:
    least = _least(recipe, options)
    if recipe.target_size is None:
        return (
            f"--bits {recipe.bits:g} is below the lowest possible mean, {least / options.weights:.2f}: raise it, or "
            "drop rules with more bits."
        )
    need, other = size_text(least + options.other_bytes), size_text(options.other_bytes)
    return (
        f"--target-size {recipe.target_size} is too small: the backbone takes at least {need} "
        f"({other} of it stays in full precision); raise it, or drop rules with more bits."
    )


def _paper(recipe: Recipe, options: Candidates) -> list[int]:
    """Assign 4 bits to the first layers and 2 to the rest (LoftQ section 4; 2.25 bits of 32 layers: the first 4).

    A layer is an entry of a numbered list of modules; several lists (encoder and decoder) have the same share each.
    """
    high, low = PAPER_WIDTHS
    layers = [_layer(candidate.unit.module or "") for candidate in options.candidates]
    counts: dict[str, int] = {}
    for layer in layers:
        if layer is not None:
            counts[layer[0]] = max(counts.get(layer[0], 0), layer[1] + 1)
    if not counts:
        raise UsageError("--mix paper needs numbered layers, which this model does not have: use --mix optimal.")

    def widths(share: float) -> list[int]:
        # A tie goes to the smaller model.
        first = {stack: -int(-(share * count - 0.5) // 1) for stack, count in counts.items()}
        wanted = [high if layer is not None and layer[1] < first[layer[0]] else low for layer in layers]
        return [w if w in c.widths else next(iter(c.widths)) for w, c in zip(wanted, options.candidates)]

    if recipe.target_size is None:
        return widths((recipe.bits - low) / (high - low))
    budget, most = _budget(recipe, options), max(counts.values())
    for count in range(most, -1, -1):
        taken = widths(count / most)
        if sum(_size(recipe, c, width) for c, width in zip(options.candidates, taken)) <= budget:
            return taken
    raise UsageError(_too_small(recipe, options))


def _layer(module: str) -> tuple[str, int] | None:
    """Split `model.layers.3.mlp.up_proj` into (`model.layers`, 3); None outside numbered lists."""
    match = _LAYER.match(module)
    return (match[1], int(match[2])) if match else None


def _ranks(recipe: Recipe, options: Candidates, measured: Measurements) -> list[int]:
    """Choose ranks by the error that each further one removes; adapters take as much space as at the mean rank."""
    assert recipe.rank_budget is not None
    reach = max(1, round(_RANK_REACH * recipe.rank_budget))
    without_rank = [candidate for candidate in options.candidates if not candidate.rank_given]
    probes = [candidate.probe for candidate in without_rank]
    norms = [curve.norm for curve in measured.curves(probes)]
    spectra = measured.spectra(probes, reach)
    items = [
        RankChoice(tuple(_scale(recipe, candidate, norm) * value**2 for value in spectrum), _adapter_size(candidate))
        for candidate, norm, spectrum in zip(without_rank, norms, spectra)
    ]
    found = iter(allocate_ranks(items, int(recipe.rank_budget * sum(item.size for item in items))))
    return [_rank(candidate) if candidate.rank_given else next(found) for candidate in options.candidates]


def _scale(recipe: Recipe, candidate: Candidate, norm: float) -> float:
    """Return the weight of a relative squared error."""
    return float(candidate.weights) if recipe.weigh == "relative" else norm**2


def _adapter_size(candidate: Candidate) -> int:
    """Return the number of adapter parameters per rank."""
    assert candidate.unit.matrix is not None
    return sum(candidate.unit.matrix.shape)


def _rank(candidate: Candidate) -> int:
    return candidate.unit.target.rank if candidate.unit.target else 0


def _with_rules(recipe: Recipe, options: Candidates, ranks: Sequence[int] | None) -> Recipe:
    """Put exact rules first, so that they win; the recipe's own rules still decide what is skipped or kept dense."""
    rules = []
    for i, candidate in enumerate(options.candidates):
        given = _rank(candidate) if candidate.rank_given else None
        rank = given if ranks is None else ranks[i]
        # An embedding without an adapter has no rank to give.
        rank = rank if candidate.unit.target is not None else None
        rules.append(exact_rule(candidate.unit.module or "", next(iter(candidate.widths)), rank))
    return dataclasses.replace(recipe, rule=(*rules, *recipe.rule), format=_container(recipe))


def _container(recipe: Recipe) -> str:
    """Return the recipe's container or, if it is `auto` and widths are mixed, one that can hold every width."""
    return with_container(recipe, BITS).format if recipe.mix else recipe.format


def _notes(recipe: Recipe, options: Candidates) -> tuple[str, ...]:
    """Return a note if the mean deviates from the requested one."""
    if not recipe.mix or recipe.target_size is not None:
        return ()
    mean = options.mean()
    if abs(mean - recipe.bits) <= _TOLERANCE * recipe.bits:
        return ()
    return (f"the mean is {mean:.3f} bits, not {recipe.bits:g}: {_reason_for_deviation(recipe)}.",)


def _reason_for_deviation(recipe: Recipe) -> str:
    if recipe.mix == "paper":
        return "whole layers at 4 bits cannot come closer"
    return "rules fix widths, or there are too few matrices to come closer"
