"""Reasons to keep a tensor in full precision. Code uses the fields; only `Reason.__str__` renders them as text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique

from loftq_cli.machine.json_record import json_record


@unique
class Why(Enum):
    """The kind of a reason. The value is its text, with placeholders for the reason's fields."""

    # from the tensor itself
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
    OUTSIDE_BASE = "task head or other layer outside the base model (choose it with --include)"
    SMALL = "smaller than {name}"
    # from transformers
    UNKNOWN = "not part of {name} (ignored by transformers)"
    TIED = "tied to {name}"
    FLOAT32 = "kept in float32 by transformers (_keep_in_fp32_modules)"
    READ_DIRECTLY = "its weight is read directly by {name}"
    UNQUANTIZED_READ = "its weight is read directly by {name} in models without a quantizer"
    DTYPE_READ = "its weight's dtype is read by {name}"
    CUSTOM_MODULE = "custom module {name}"
    REARRANGED = "split, joined or transposed by transformers while loading"
    PARAMETRIZED = "parametrized weight"
    # from the recipe
    RULE_SKIP = "rule '{name}=skip'"
    RULE_DENSE = "rule '{name}=dense'"
    EXCLUDED = "--exclude"
    NOT_INCLUDED = "not in --include"
    EXPERTS_KEPT = "expert (--experts keep)"
    HEAD_KEPT = "output head (--lm-head keep)"
    EMBEDDINGS_KEPT = "embedding (--embeddings keep)"
    OTHER_TOWER = "{name} tower (choose it with --include)"
    # from its weights or its container
    NONFINITE = "holds {found}"
    BESIDE_NONFINITE = "stacked with {name}, which holds {found}"
    REFUSED = "{found}"


@json_record
@dataclass(frozen=True)
class Reason:
    """Why one tensor stays in full precision.

    Attributes:
        name: the object that the reason refers to: the parameter a tensor is tied to or stacked with, the class that
            reads its weight or its dtype or does not know it, the pattern of the rule, the tower; "" for none.
        found: the container's text for its refusal, or the first number that is not finite and its place.
    """

    why: Why
    name: str = ""
    found: str = ""

    def __str__(self) -> str:
        return self.why.value.format(name=self.name, found=self.found)
