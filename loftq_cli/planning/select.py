"""Decide which matrices are quantized, with how many bits and which rank, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loftq_cli.checkpoint.base import QUANTIZABLE, TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.modules.reasons import Reason, Why
from loftq_cli.modules.roles import TensorRole
from loftq_cli.recipe.model import Recipe, Rule


@dataclass(frozen=True)
class Decision:
    """The decision for one tensor.

    Attributes:
        bits: 0 keeps it in full precision.
        rank: of its adapter; 0 for no adapter.
        reason: why it stays in full precision; None if it is quantized.
    """

    bits: int
    rank: int
    reason: Reason | None = None


def decide(role: TensorRole, info: TensorInfo, recipe: Recipe) -> Decision:
    """Apply the model's own constraints, then the user's filters, then the rules.

    Raises:
        LoftqError: a matrix that would be quantized does not contain floating-point numbers.
    """
    reason = None if role.optional and _included(role, recipe) else role.keep
    reason = reason or _filtered(role, recipe)
    if reason is not None:
        return Decision(0, 0, reason)
    assert role.module is not None, "a tensor that may be quantized is a module's weight"
    rule = next((rule for rule in recipe.rules if rule.matches(role.module)), Rule(""))  # the first match wins
    if rule.keep == "skip":
        return Decision(0, 0, Reason(Why.RULE_SKIP, rule.pattern))
    if info.dtype not in QUANTIZABLE:
        raise LoftqError(
            f"{info.name} in {info.file} is stored as {str(info.dtype).removeprefix('torch.')}: loftq quantizes "
            "float32, bfloat16 and float16 weights, so give the full-precision model or leave this matrix out with "
            f"--exclude '{role.module}'."
        )
    # A rank above that of the matrix adds nothing.
    rank = min(rule.rank or recipe.rank, *info.shape[-2:])
    if rule.keep == "dense":
        return Decision(0, rank, Reason(Why.RULE_DENSE, rule.pattern))
    if role.kind == "embedding" and recipe.embeddings == "quantize":
        rank = 0
    return Decision(rule.bits or recipe.base_bits, rank)


def unused_filters(recipe: Recipe, roles: Sequence[TensorRole]) -> list[str]:
    """Return the filters and rules that match no module of the model, most likely because of typing errors."""
    modules = [role.module for role in roles if role.module]
    unused = [
        f"--rule '{text}'" for text, rule in zip(recipe.rule, recipe.rules) if not any(map(rule.matches, modules))
    ]
    for flag, globs in (("--include", recipe.include), ("--exclude", recipe.exclude)):
        unused += [f"{flag} '{glob}'" for glob in globs if not any(fnmatchcase(module, glob) for module in modules)]
    return unused


def included_but_kept(recipe: Recipe, roles: Sequence[TensorRole]) -> dict[str, str]:
    """Return the --include globs that match weights of which none can be quantized, with the reasons."""
    found = {}
    for glob in recipe.include:
        named = [role for role in roles if role.module and fnmatchcase(role.module, glob)]
        reasons = [role.keep for role in named if role.keep and not role.optional]
        if named and len(reasons) == len(named):
            found[glob] = ", ".join(sorted({str(reason) for reason in reasons}))
    return found


def _included(role: TensorRole, recipe: Recipe) -> bool:
    """True if --include names the tensor's module."""
    return role.module is not None and any(fnmatchcase(role.module, glob) for glob in recipe.include)


def _filtered(role: TensorRole, recipe: Recipe) -> Reason | None:
    """Return the reason to keep a tensor that the recipe's filters or options for kinds of matrices give, if any."""
    if role.kind == "other" or role.module is None:
        return Reason(Why.NOT_LINEAR)
    if any(fnmatchcase(role.module, glob) for glob in recipe.exclude):
        return Reason(Why.EXCLUDED)
    included = _included(role, recipe)
    if recipe.include and not included:
        return Reason(Why.NOT_INCLUDED)
    if role.kind == "expert" and recipe.experts == "keep":
        return Reason(Why.EXPERTS_KEPT)
    if role.kind == "head" and recipe.lm_head == "keep":
        return Reason(Why.HEAD_KEPT)
    if role.kind == "embedding" and role.tied and recipe.embeddings != "quantize":
        # An adapter on the table alone would untie the two.
        return Reason(Why.TIED, role.tied)
    if role.kind == "embedding" and recipe.embeddings == "keep":
        return Reason(Why.EMBEDDINGS_KEPT)
    if role.tower != "text" and not included:
        return Reason(Why.OTHER_TOWER, role.tower)
    return None
