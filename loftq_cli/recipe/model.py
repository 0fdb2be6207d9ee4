"""`Recipe`: every setting that determines the bytes of an output, given by flags, YAML or Python."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from loftq_cli.errors import UsageError
from loftq_cli.numerics.grids.codebooks import TRELLIS
from loftq_cli.recipe.choices import (
    BITS,
    CALIBRATED,
    DTYPE_CHOICES,
    FITTING,
    FORMAT_NAMES,
    ITERS,
    PAPER_WIDTHS,
    STARTS,
)
from loftq_cli.recipe.field import FieldError, Spec, refusal, refusal_of, specs_of
from loftq_cli.recipe.fields import RecipeFields
from loftq_cli.recipe.rules import Rule, exact_rule, parse_rule, parse_size
from loftq_cli.recipe.yaml_file import MATRIX, PLACES, place_of, read_one, read_places, read_yaml

__all__ = [
    "BITS",
    "DTYPE_CHOICES",
    "FORMAT_NAMES",
    "MATRIX",
    "PAPER_WIDTHS",
    "PLACES",
    "Recipe",
    "Rule",
    "exact_rule",
    "make_recipe",
    "parse_rule",
    "parse_size",
    "read_places",
    "read_yaml",
    "recipe_fields",
    "recipe_specs",
    "write_yaml",
]

_NAMES = ("model", "revision", "calibrate")  # these locate inputs and do not change the output


@dataclass(frozen=True)
class Recipe(RecipeFields):
    """Every setting of a conversion. The same recipe and source produce the same bytes.

    In a plan, `revision` is the commit of a model on the Hub, or None if the source is a directory; if bits or ranks
    were allocated, `rule` holds the result for every matrix; `calibration_hash` is the sha256 of the data that
    `calibrate` names. `mix` is "" if all matrices have the same width.

    Raises:
        UsageError: a field is unknown, has an invalid value, or contradicts another.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, values: Any, validate: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        try:
            return validate(values)
        except ValidationError as error:
            raise refusal_of(cls, error) from None

    def __post_init__(self) -> None:
        """Set the fields that depend on others, and refuse combinations that contradict each other."""
        if self.iters is None:
            object.__setattr__(self, "iters", ITERS[self.method])
        if self.calibrate_kind is None:
            object.__setattr__(self, "calibrate_kind", "full" if self.method == CALIBRATED else "diagonal")
        if self.method in STARTS and self.init is None:
            object.__setattr__(self, "init", "svd")
        if isinstance(self.bits, float) and self.bits.is_integer():
            object.__setattr__(self, "bits", int(self.bits))
        if self.mix == "" and (self.target_size is not None or isinstance(self.bits, float)):
            object.__setattr__(self, "mix", "optimal")
        self._check_bits()
        self._check_calibration()
        self._check_method()

    def _check_bits(self) -> None:
        if not (BITS[0] <= self.bits <= BITS[-1] if self.mix else self.bits in BITS):
            raise refusal(recipe_specs()["bits"], self.bits)
        if self.mix == "paper" and self.target_size is None and self.bits > PAPER_WIDTHS[0]:
            raise UsageError(f"--mix paper uses 4 and 2 bits, so the mean cannot be {self.bits:g}: give 2 to 4.")

    def _check_calibration(self) -> None:
        if self.calibrate is None:
            if self.method == CALIBRATED:
                raise UsageError(
                    f"--method {self.method} needs --calibrate: give a text like those the model will read."
                )
            return
        if self.plain:
            raise UsageError(
                "--calibrate weights the fit of the adapter, which qlora and --iters 0 skip: remove one of the two."
            )
        if self.method == "qa-lora":
            raise UsageError(
                "--calibrate does not support qa-lora, whose adapters receive sums of inputs: remove one of the two."
            )

    def _check_method(self) -> None:
        if self.init is not None and self.method not in STARTS:
            needed = " or ".join(STARTS)
            raise UsageError(f"--init {self.init} needs --method {needed}: {self.method} does not support it.")
        if self.levels in TRELLIS and self.method == "qa-lora":
            raise UsageError(
                f"--levels {self.levels} has no zero points, as --method qa-lora needs: remove one of the two."
            )
        if self.levels not in (None, *TRELLIS) and self.method not in FITTING:
            needed = " or ".join(FITTING)
            raise UsageError(f"--levels {self.levels} needs --method {needed}: {self.method} does not support it.")
        if self.levels and self.data_type not in ("auto", "nf"):
            raise UsageError(f"--levels {self.levels} replaces --data-type {self.data_type}: give one of the two.")
        if self.double_quant and self.method == "refined":
            raise UsageError("--double-quant rounds scales that --method refined would fit: give one of the two.")

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The parsed rules."""
        return tuple(parse_rule(text) for text in self.rule)

    @property
    def allocates(self) -> bool:
        """True if widths or ranks are chosen for each matrix within a budget."""
        return bool(self.mix) or self.rank_budget is not None

    def unmixed(self) -> Recipe:
        """Return the recipe without a budget: every matrix has the base width and rank, except for rules."""
        return dataclasses.replace(self, bits=self.base_bits, mix="", target_size=None, rank_budget=None)

    @property
    def base_bits(self) -> int:
        """Bits of a matrix that no rule matches; in a mix, rules match every matrix that can be quantized."""
        return int(self.bits) if self.bits in BITS else BITS[0]

    @property
    def plain(self) -> bool:
        """True for plain quantization with an adapter that starts at zero: QLoRA, which is LoftQ with T = 0."""
        return self.method == "qlora" or self.iters == 0 or (self.method == "qa-lora" and self.init == "zero")

    @property
    def fits_scales(self) -> bool:
        """True if scales are fitted whatever the rank, so that even a matrix without an adapter has steps."""
        return self.method in FITTING

    @property
    def pooling(self) -> int:
        """Number of inputs that are summed before an adapter (QA-LoRA), its group size; 1 for no pooling."""
        return self.group_size or 1 if self.method == "qa-lora" else 1

    @property
    def codebook_type(self) -> str:
        """`levels`, or the data type if no levels are given."""
        return self.levels or self.data_type

    @property
    def scaling(self) -> float:
        """alpha / rank, the factor by which PEFT multiplies BA."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def as_dict(self) -> dict[str, Any]:
        """Return plain values in the order of the fields, as in loftq.yaml."""
        values = {name: getattr(self, name) for name in recipe_specs()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fingerprint(self, source: str) -> str:
        """Return a hash of the recipe and the fingerprint of the source. Fields that only locate the source or the text
        are left out: the same model produces the same bytes from a directory and from the Hub."""
        values = {name: value for name, value in self.as_dict().items() if name not in _NAMES}
        return hashlib.sha256(json.dumps([values, source], sort_keys=True).encode()).hexdigest()


@cache
def recipe_specs() -> dict[str, Spec]:
    """Return the declarations of all fields, in order."""
    return specs_of(Recipe)


def recipe_fields() -> dict[str, Any]:
    """Return every field of a recipe with its default (`model` has none)."""
    return {name: spec.default for name, spec in recipe_specs().items()}


def make_recipe(given: Mapping[str, Any], config: Path | None = None) -> Recipe:
    """Return the recipe of a YAML file (`config`), overridden by `given`; None in `given` means not given.

    Raises:
        UsageError: a field is unknown or its value invalid, or there is no model. It names the file and the line if
            the value is from there.
    """
    values = {} if config is None else read_one(config)
    values = {name: value for name, value in values.items() if name not in PLACES}
    given = {name: value for name, value in given.items() if value is not None}
    in_file = {name for name in values if name not in given}
    values.update(given)
    known = recipe_fields()
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}."
            where = f"{place_of(config, name)}: " if config is not None and name in in_file else ""
            raise UsageError(f"{where}a recipe has no field '{name}': {hint}")
    if {"bits", "target_size"} <= set(given) and len(given) < len(known):  # a whole recipe names every field
        raise UsageError(f"--target-size {given['target_size']} chooses the bits of every matrix: leave out --bits.")
    if not values.get("model"):
        raise UsageError("no model was given: name a checkpoint's directory, or a model on the Hub as org/name.")
    values["model"] = str(values["model"])
    try:
        return Recipe(**values)
    except FieldError as error:
        if config is None or error.name not in in_file:
            raise
        raise located(error, config) from error


def located(error: FieldError, config: Path) -> UsageError:
    """Return the error with the place in the recipe file instead of the flag."""
    return UsageError(f"{place_of(config, error.name)}: {error.name} {error.predicate}")


def write_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with which `loftq quantize --config` repeats the run."""
    import yaml

    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)
