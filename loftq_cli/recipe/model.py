"""`Recipe`: everything that decides an output's bytes, from flags, YAML or Python, validated in one place."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.recipe.checks import check, check_text
from loftq_cli.recipe.choices import BITS, CHOICES, DTYPE_CHOICES, FORMAT_NAMES, ITERS, LEAST, PAPER_WIDTHS, STARTS
from loftq_cli.recipe.rules import Rule, exact_rule, parse_rule, parse_size
from loftq_cli.recipe.yaml_file import MATRIX, PLACES, read_one, read_places, read_yaml

__all__ = [
    "BITS",
    "CHOICES",
    "DTYPE_CHOICES",
    "FORMAT_NAMES",
    "LEAST",
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
    "write_yaml",
]

_NAMES = ("model", "revision", "calibrate")  # where things are, not what they are


@dataclass(frozen=True)
class Recipe:
    """What the user asks. The same recipe on the same source gives the same bytes. See `loftq quantize --help`.

    In a plan, `revision` is the commit of a model on the Hub, and None says that the source is a directory; where bits
    or ranks were allocated, `rule` holds what every matrix got; `calibration_hash` is the sha256 of what `calibrate`
    names.

    Attributes:
        bits: of every matrix; a mean over the quantized weights where `mix` is given.
        mix: how widths are mixed, "" for not at all. A mean that is no width, or a `target_size`, makes it "optimal".
        target_size: bytes of the backbone's tensors and headers to stay within; takes the place of the mean.
        rank_budget: mean rank to allocate, weighted so that the adapter is as large as with that rank everywhere.
    """

    model: str
    revision: str | None = None
    bits: float = 4
    mix: str = ""
    target_size: str | None = None
    weigh: str = "relative"
    rank: int = 16
    rank_budget: float | None = None
    iters: int = None  # type: ignore[assignment]  # set in __post_init__: it depends on the method
    method: str = "loftq"
    init: str | None = None
    levels: str | None = None
    data_type: str = "auto"
    block_size: int = 64
    group_size: int | None = None
    scale: str = "auto"
    symmetric: bool | None = None
    double_quant: bool = False
    format: str = "auto"
    dequantize: bool = True
    rule: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: str = "keep"
    lm_head: str = "keep"
    experts: str = "quantize"
    allow_nonfinite: bool = False
    alpha: float | None = None
    keep_last: bool = False
    svd: str = "fast"
    dtype: str = "auto"
    calibrate: str | None = None
    calibration_tokens: int = 16384
    calibrate_kind: str = "diagonal"
    calibration_hash: str | None = None
    seed: int = 0
    max_shard_size: str = "5GB"
    meta_version: str = "auto"
    rules: tuple[Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rule", "include", "exclude"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else () if value is None else value
            value = tuple(value) if isinstance(value, (list, tuple)) else (None,)
            if not all(isinstance(item, str) for item in value):
                raise UsageError(f"{name} must be a list of strings.")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "meta_version", str(self.meta_version))  # YAML reads 3.1 as a number
        if isinstance(self.calibrate, Path):
            object.__setattr__(self, "calibrate", str(self.calibrate))
        if self.iters is None:
            object.__setattr__(self, "iters", ITERS.get(str(self.method), 5))
        if self.method in STARTS and self.init is None:
            object.__setattr__(self, "init", "svd")
        check_text(self)
        if isinstance(self.bits, float) and self.bits.is_integer():
            object.__setattr__(self, "bits", int(self.bits))
        if self.mix == "" and (self.target_size is not None or isinstance(self.bits, float)):
            object.__setattr__(self, "mix", "optimal")
        check(self)
        if self.target_size is not None:  # YAML reads a number of bytes as a number
            object.__setattr__(self, "target_size", str(self.target_size))
        object.__setattr__(self, "rules", tuple(parse_rule(text) for text in self.rule))

    @property
    def allocates(self) -> bool:
        """Whether widths or ranks are chosen matrix by matrix under a budget."""
        return bool(self.mix) or self.rank_budget is not None

    def unmixed(self) -> Recipe:
        """The same without a budget: every matrix at the base width and rank, but for rules."""
        return dataclasses.replace(self, bits=self.base_bits, mix="", target_size=None, rank_budget=None)

    @property
    def base_bits(self) -> int:
        """The width of a matrix that no rule names; where widths are mixed, rules name all that can be quantized."""
        return int(self.bits) if self.bits in BITS else BITS[0]

    @property
    def plain(self) -> bool:
        """Plain quantization and an adapter that starts at zero: QLoRA, which is LoftQ with T = 0."""
        return self.method == "qlora" or self.iters == 0 or (self.method == "qa-lora" and self.init == "zero")

    @property
    def pooling(self) -> int:
        """Inputs pooled before an adapter sees them (QA-LoRA): its group; 1 for none."""
        return self.group_size or 1 if self.method == "qa-lora" else 1

    @property
    def codebook_type(self) -> str:
        """The data type, or what `levels` puts in its place."""
        return self.levels or self.data_type

    @property
    def scaling(self) -> float:
        """alpha / rank, what PEFT multiplies BA by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def as_dict(self) -> dict[str, Any]:
        """Plain values in the order of the fields, as they stand in loftq.yaml."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fingerprint(self, source: str) -> str:
        """One hash of the recipe and the source's own fingerprint. What only names the source or the text does not
        count: the same model gives the same bytes from a directory and from the Hub."""
        values = {name: value for name, value in self.as_dict().items() if name not in _NAMES}
        return hashlib.sha256(json.dumps([values, source], sort_keys=True).encode()).hexdigest()


def recipe_fields() -> dict[str, Any]:
    """Every field a recipe may have, with its default (`model` has none)."""
    fields = [f for f in dataclasses.fields(Recipe) if f.init]
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}


def make_recipe(given: Mapping[str, Any], config: Path | None = None) -> Recipe:
    """A recipe from a YAML file (`config`) with `given` on top; what is None in `given` was not given.

    Raises:
        UsageError: an unknown field, a value that cannot be meant, or no model.
    """
    values = {} if config is None else read_one(config)
    values = {name: value for name, value in values.items() if name not in PLACES}
    values.update({name: value for name, value in given.items() if value is not None})
    known = recipe_fields()
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise UsageError(f"a recipe has no field '{name}': {hint}")
    if not values.get("model"):
        raise UsageError("no model was given: name a checkpoint's directory, or a model on the Hub as org/name.")
    values["model"] = str(values["model"])
    return Recipe(**values)


def write_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: `loftq quantize --config` repeats the run from it."""
    import yaml

    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)
