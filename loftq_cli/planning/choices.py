"""Stage 2 of a plan: the recipe with every `auto` resolved, and the bits and rank of every tensor."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from loftq_cli.errors import LoftqError
from loftq_cli.formats import FORMATS, get_container
from loftq_cli.formats.base import DTYPE_NAMES, DTYPES, Request
from loftq_cli.formats.container import Container
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.modules.roles import ModuleMap, TensorRole
from loftq_cli.planning.checks import refuse_together
from loftq_cli.planning.resolve import resolve
from loftq_cli.planning.select import Decision, decide, included_but_kept, unused_filters
from loftq_cli.planning.source import Source
from loftq_cli.recipe.model import Recipe
from loftq_cli.tensorfile.entry_names import whole_name


@dataclass(frozen=True)
class Choices:
    """The request for every tensor and for the output as a whole, before the container accepts or refuses it.

    Attributes:
        recipe: the user's, with every `auto` resolved.
        decisions: by tensor.
        dtype: the model's.
        request: the request for the whole output.
        nonfinite: as given to `choose`; empty if nothing was found.
        notes: sentences for the user.
    """

    recipe: Recipe
    decisions: Mapping[str, Decision]
    dtype: torch.dtype
    request: Request
    nonfinite: Mapping[str, str]
    notes: tuple[str, ...]


def choose(recipe: Recipe, source: Source, nonfinite: Mapping[str, str] | None = None) -> Choices:
    """Resolve the recipe for this model.

    Args:
        nonfinite: the first number that is not finite and its place, such as "nan at [3, 5]", for every matrix that has
            one, by tensor; None if no weight was read.

    Raises:
        UsageError: flags contradict each other, or the container cannot hold this model.
        LoftqError: nothing is left to quantize, or a matrix does not contain floating-point numbers.
    """
    checkpoint, modules = source.checkpoint, source.modules
    decisions = {role.tensor: decide(role, checkpoint.tensors[role.tensor], recipe) for role in modules.roles}
    decisions |= _keep_nonfinite(modules, nonfinite or {})
    _refuse_nothing(recipe, source, modules, decisions)
    settled = resolve(recipe, modules, decisions)
    dtype = _model_dtype(recipe, source, decisions)
    unmet = _unmet_needs(settled, dtype, modules, decisions)
    if unmet:
        modules = dataclasses.replace(modules, roles=tuple(_kept(role, unmet) for role in modules.roles))
        decisions |= {tensor: Decision(0, 0, reason) for tensor, reason in unmet.items()}
        _refuse_nothing(settled, source, modules, decisions)
    request = Request(modules.task_type, settled.dequantize, checkpoint.config, source.tokenizer)
    refuse_together((), settled, request)
    return Choices(
        recipe=settled,
        decisions=decisions,
        dtype=dtype,
        request=request,
        nonfinite=dict(nonfinite or {}),
        notes=(
            *_filter_notes(recipe, modules),
            *_nonfinite_notes(recipe, nonfinite),
            *_unmet_notes(settled, dtype, source, unmet),
        ),
    )


def _refuse_nothing(recipe: Recipe, source: Source, modules: ModuleMap, decisions: Mapping[str, Decision]) -> None:
    """
    Raises:
        LoftqError: nothing is left to quantize.
    """
    if any(decision.bits for decision in decisions.values()):
        return
    kept = included_but_kept(recipe, modules.roles).items()
    reasons = "".join(f" (--include '{glob}' names only: {reason})" for glob, reason in kept)
    raise LoftqError(
        f"nothing in {source.checkpoint.path} is left to quantize{reasons}: check --include, --exclude and --rule."
    )


def _unmet_needs(
    recipe: Recipe, dtype: torch.dtype, modules: ModuleMap, decisions: Mapping[str, Decision]
) -> dict[str, Reason]:
    """Return the selected tensors whose layers need what those of the container lack, with the reason."""
    chosen = (role for role in modules.roles if decisions[role.tensor].bits)
    found = {role.tensor: _unmet(role, get_container(recipe.format), recipe, dtype) for role in chosen}
    return {tensor: reason for tensor, reason in found.items() if reason is not None}


def _unmet(role: TensorRole, container: Container, recipe: Recipe, dtype: torch.dtype) -> Reason | None:
    return container.unmet(role.needs, dequantize=recipe.dequantize, in_float32=DTYPE_NAMES[dtype] in role.float32)


def _kept(role: TensorRole, unmet: Mapping[str, Reason]) -> TensorRole:
    """Return the role as it is in the container."""
    return dataclasses.replace(role, keep=unmet[role.tensor], optional=False) if role.tensor in unmet else role


def _either(names: Sequence[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _unmet_notes(recipe: Recipe, dtype: torch.dtype, source: Source, unmet: Mapping[str, Reason]) -> list[str]:
    """Return a note on the share of the weights that only other containers quantize, and their names."""
    if not unmet:
        return []
    tensors = source.checkpoint.tensors
    share = sum(prod(tensors[name].shape) for name in unmet) / sum(prod(info.shape) for info in tensors.values())
    roles = [role for role in source.modules.roles if role.tensor in unmet]
    others = [
        name for name, container in FORMATS.items() if not any(_unmet(role, container, recipe, dtype) for role in roles)
    ]
    count = "1 matrix stays" if len(unmet) == 1 else f"{len(unmet)} matrices stay"
    reasons = "; ".join(sorted({str(reason) for reason in unmet.values()}))
    return [
        f"{count} in full precision, {share:.0%} of the weights, because layers of {recipe.format} cannot replace them "
        f"({reasons}): --format {_either(others)} quantizes them."
    ]


def _keep_nonfinite(modules: ModuleMap, nonfinite: Mapping[str, str]) -> dict[str, Decision]:
    """Keep tensors with NaN or infinity in full precision, and the experts stacked with them: all of them or none."""
    decisions = {name: Decision(0, 0, Reason(Why.NONFINITE, found=found)) for name, found in nonfinite.items()}
    experts = [role for role in modules.roles if role.expert is not None]
    for name, found in nonfinite.items():
        parameters = {role.parameter for role in experts if role.tensor == whole_name(name)}
        beside = Decision(0, 0, Reason(Why.BESIDE_NONFINITE, name, found))
        for role in experts:
            if role.parameter in parameters:
                decisions.setdefault(role.tensor, beside)
    return decisions


def _model_dtype(recipe: Recipe, source: Source, decisions: Mapping[str, Decision]) -> torch.dtype:
    """Return the dtype that transformers will load the model in: the user's, the config's, or that of most weights."""
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    config, tensors = source.checkpoint.config, source.checkpoint.tensors
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named in DTYPES:
        return DTYPES[named]
    chosen = [role for role in source.modules.roles if decisions[role.tensor].bits]
    plain = [role for role in chosen if not role.needs] or chosen  # others may be stored in float32 on purpose
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for role in plain:
        bytes_by_dtype[tensors[role.tensor].dtype] += tensors[role.tensor].nbytes
    most = bytes_by_dtype.most_common(1)[0][0]
    return most if most in DTYPE_NAMES else torch.float32


def _filter_notes(recipe: Recipe, modules: ModuleMap) -> list[str]:
    unused = [f"{text} matches no module of this model." for text in unused_filters(recipe, modules.roles)]
    kept = included_but_kept(recipe, modules.roles).items()
    return unused + [f"--include '{glob}' names only weights that stay in full precision: {why}." for glob, why in kept]


def _nonfinite_notes(recipe: Recipe, nonfinite: Mapping[str, str] | None) -> list[str]:
    if nonfinite:
        return [
            f"{name} {Reason(Why.NONFINITE, found=found)} and stays in full precision."
            for name, found in nonfinite.items()
        ]
    if recipe.allow_nonfinite and nonfinite is None:
        return ["no weight was read: a matrix that holds NaN or infinity will stay in full precision."]
    return []
