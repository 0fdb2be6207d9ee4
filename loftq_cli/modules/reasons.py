"""Reasons to leave a tensor in full precision: data for the code, rendered for people in `Reason.__str__` alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Why(Enum):
    """The kind of a reason. The value is its text, with places for the reason's fields."""

    # what the tensor is
    BIAS = "bias"
    NORM = "normalization"
    NOT_MATRIX = "not a matrix"
    NOT_LINEAR = "not a linear layer"
    CONVOLUTION = "convolution"
    ROUTER = "router"
    EXPERTS = "mixture-of-experts weights"
    EMBEDDING = "embedding"
    POSITION = "position embedding"
    TASK_HEAD = "task head"
    SMALL = "smaller than {name}"
    # how transformers treats it
    UNKNOWN = "not part of {name} (ignored by transformers)"
    TIED = "tied to {name}"
    FLOAT32 = "kept in float32 by transformers (_keep_in_fp32_modules)"
    READ_DIRECTLY = "its weight is read directly by {name}"
    CUSTOM_MODULE = "custom module {name}"
    REARRANGED = "split, joined or transposed by transformers while loading"
    PARAMETRIZED = "parametrized weight"
    # what the recipe says
    RULE_SKIP = "rule '{name}=skip'"
    RULE_DENSE = "rule '{name}=dense'"
    EXCLUDED = "--exclude"
    NOT_INCLUDED = "not in --include"
    EXPERTS_KEPT = "expert (--experts keep)"
    HEAD_KEPT = "output head (--lm-head keep)"
    EMBEDDINGS_KEPT = "embedding (--embeddings keep)"
    OTHER_TOWER = "{name} tower (choose it with --include)"
    # what its weights or its container allow
    NONFINITE = "holds {found}"
    BESIDE_NONFINITE = "stacked with {name}, which holds {found}"
    REFUSED = "{found}"


@dataclass(frozen=True)
class Reason:
    """Why one tensor stays in full precision.

    Attributes:
        name: what else the reason is about: the parameter a tensor is tied to or stacked with, the class that reads its
            weight or does not know it, the pattern of the rule, the tower; "" where there is nothing.
        found: the container's own words for its refusal, or the first number that is not finite and its place.
    """

    why: Why
    name: str = ""
    found: str = ""

    def __str__(self) -> str:
        return self.why.value.format(name=self.name, found=self.found)
