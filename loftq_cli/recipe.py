"""`Recipe`: everything that decides an output's bytes, from flags, YAML or Python, validated in one place."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.numerics.codebooks import DATA_TYPES, LEVELS

BITS = (2, 3, 4, 8)
MIXES = ("optimal", "paper")
PAPER_WIDTHS = (4, 2)  # of the first layers and of the rest (LoftQ section 4)
WEIGHINGS = ("relative", "absolute")
BLOCK_SIZES = (32, 64, 128, 256)
GROUP_SIZES = (-1, 32, 64, 128, 256)
DATA_TYPE_CHOICES = ("auto", *DATA_TYPES, "int")
SCALES = ("auto", "absmax", "minmax", "mse")
METHODS = ("loftq", "refined", "qlora", "qa-lora")
ITERS = {"loftq": 5, "refined": 16, "qlora": 5, "qa-lora": 5}  # by method, where none are given
INITS = ("svd", "zero")
STARTS = ("refined", "qa-lora")  # methods whose start can be chosen
FORMAT_NAMES = ("auto", "packed", "bnb", "gptq", "gptq-v2", "compressed-tensors", "gguf", "dense")
EMBEDDINGS = ("keep", "quantize", "adapt")
LM_HEADS = ("keep", "quantize")
EXPERTS = ("quantize", "require", "keep")
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
SVDS = ("fast", "exact")
CALIBRATE_KINDS = ("diagonal", "full")
META_VERSIONS = ("auto", "1", "2", "code", "3", "3.1", "3.2")

_MAX_YAML, _DEEPEST = 1_000_000, 100
# What a field may be, and the least a whole number may be: `_check` and the JSON schema read the same tables.
CHOICES: dict[str, tuple[Any, ...]] = {
    "block_size": BLOCK_SIZES,
    "method": METHODS,
    "data_type": DATA_TYPE_CHOICES,
    "scale": SCALES,
    "format": FORMAT_NAMES,
    "embeddings": EMBEDDINGS,
    "lm_head": LM_HEADS,
    "experts": EXPERTS,
    "dtype": DTYPE_CHOICES,
    "svd": SVDS,
    "calibrate_kind": CALIBRATE_KINDS,
    "weigh": WEIGHINGS,
    "init": INITS,
    "levels": LEVELS,
    "meta_version": META_VERSIONS,
}
LEAST = {"rank": 1, "iters": 0, "calibration_tokens": 1, "seed": 0}
_NAMES = ("model", "revision", "calibrate")  # where things are, not what they are

# What a YAML file may say beside the recipe: where the output goes. It decides no byte, so it is not in `loftq.yaml`.
PLACES = ("output", "push_to")
MATRIX = "matrix"  # of a file for `loftq batch`

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Rule:
    """`REGEX=SPEC`: what the first rule whose regex is found in a module's path says of it.

    Attributes:
        bits, rank: overrides; None leaves the recipe's own.
        keep: `skip` leaves the matrix alone; `dense` leaves it in full precision but gives it an adapter that starts
            at zero; "" quantizes it.
    """

    pattern: str
    bits: int | None = None
    rank: int | None = None
    keep: str = ""

    @property
    def exact(self) -> bool:
        """Whether it names one module, as `exact_rule` writes it."""
        module = re.sub(r"\\(.)", r"\1", self.pattern[1:-1])
        return self.pattern == f"^{re.escape(module)}$"

    def matches(self, module: str) -> bool:
        return re.search(self.pattern, module) is not None


def parse_rule(text: str) -> Rule:
    """`'down_proj=4:32'`, `'layers\\.0\\.=skip'`, `'lm_head=dense'` → `Rule`.

    Raises:
        UsageError: the text is no rule.
    """
    pattern, separator, spec = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the rule '{text}' has a broken regular expression ({error}).") from error
    if not separator or not pattern:
        raise UsageError(f"'{text}' is no rule: write REGEX=SPEC, SPEC being bits, bits:rank, skip or dense.")
    if spec in ("skip", "dense"):
        return Rule(pattern, keep=spec)
    match = re.fullmatch(r"(\d)(?::(\d{1,9}))?", spec, re.ASCII)
    if match is None or int(match[1]) not in BITS or (match[2] and int(match[2]) == 0):
        raise UsageError(f"'{spec}' in the rule '{text}' is no SPEC: write 2, 3, 4 or 8, bits:rank, skip or dense.")
    return Rule(pattern, bits=int(match[1]), rank=int(match[2]) if match[2] else None)


def exact_rule(module: str, bits: int, rank: int | None = None) -> str:
    """The rule that gives one module its bits, and its rank where one is named."""
    return f"^{re.escape(module)}$={bits}" + (f":{rank}" if rank else "")


def parse_size(text: str | int) -> int:
    """`'5GB'`, `'500MiB'`, `'1000000'` → bytes.

    Raises:
        UsageError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text), re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"'{text}' is no size: write a number with KB, MB, GB, KiB, MiB or GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


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
        _check_text(self)
        if isinstance(self.bits, float) and self.bits.is_integer():
            object.__setattr__(self, "bits", int(self.bits))
        if self.mix == "" and (self.target_size is not None or isinstance(self.bits, float)):
            object.__setattr__(self, "mix", "optimal")
        _check(self)
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
    values = {} if config is None else _one_recipe(config)
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


def read_places(config: Path | None) -> dict[str, str]:
    """What a YAML recipe says of `PLACES`; what it does not say is left out.

    Raises:
        UsageError: the file cannot be read, or a place is no text.
    """
    values = {} if config is None else _one_recipe(config)
    found = {name: values[name] for name in PLACES if values.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{name} in {config} cannot be {value!r}: give a text.")
    return found


def _one_recipe(config: Path) -> dict[str, Any]:
    values = read_yaml(config)
    if MATRIX in values:
        raise UsageError(f"{config} stands for several recipes (matrix:): run it with `loftq batch {config}`.")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML recipe; tags that would build objects are refused.

    Raises:
        UsageError: the file is missing or is no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml(path, text)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' a line.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of values such as 2001-99-99 and !!bool x
        raise UsageError(f"a value in {path} makes no sense ({' '.join(str(error).split())}): correct it.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{path} is no recipe: write one 'name: value' a line, such as 'bits: 2'.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _check_yaml(path: Path, text: str) -> None:
    """The parser's time grows with the square of the depth, and its own refusals come late."""
    depth = deepest = 0
    for character in text if len(text) <= _MAX_YAML else "":
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if len(text) > _MAX_YAML or deepest > _DEEPEST or "- " * _DEEPEST in text or "? " * _DEEPEST in text:
        raise UsageError(f"{path} is too long or nested too deeply: write one 'name: value' a line.")


def write_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: `loftq quantize --config` repeats the run from it."""
    import yaml

    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def _check_text(recipe: Recipe) -> None:
    """YAML can hold halves of characters and zeros, which neither files nor paths can."""
    for name, value in recipe.as_dict().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (text.encode("utf-8", "replace").decode() != text or "\0" in text):
                raise UsageError(f"{name} holds a character that is none: correct {text!r:.80}.")


def _check(recipe: Recipe) -> None:
    _check_budget(recipe)
    for name, allowed in CHOICES.items():
        value = getattr(recipe, name)
        absent = value is None and name in ("init", "levels")
        if not absent and not any(type(value) is type(choice) and value == choice for choice in allowed):
            listed = ", ".join(str(item) for item in allowed)
            raise UsageError(f"--{name.replace('_', '-')} cannot be {_shown(value)}: choose one of {listed}.")
    for name, least in LEAST.items():
        value = getattr(recipe, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot be {_shown(value)}: give a whole number from {least} on."
            )
    _check_calibration(recipe)
    if recipe.init is not None and recipe.method not in STARTS:
        raise UsageError(
            f"--init {recipe.init} needs --method {' or '.join(STARTS)}; {recipe.method} has no such choice."
        )
    if recipe.levels is not None and recipe.method != "refined":
        raise UsageError(f"--levels {recipe.levels} needs --method refined; {recipe.method} has no such choice.")
    if recipe.levels and recipe.data_type not in ("auto", "nf"):
        raise UsageError(
            f"--levels {recipe.levels} takes the place of --data-type {recipe.data_type}: give one of the two."
        )
    if recipe.double_quant is True and recipe.method == "refined":
        raise UsageError("--double-quant rounds scales that --method refined would fit: give one of the two.")
    for name in ("keep_last", "allow_nonfinite", "double_quant", "dequantize"):
        if not isinstance(getattr(recipe, name), bool):
            raise UsageError(f"{name} cannot be {_shown(getattr(recipe, name))}: give true or false.")
    if recipe.symmetric is not None and not isinstance(recipe.symmetric, bool):
        raise UsageError(f"symmetric cannot be {_shown(recipe.symmetric)}: give true or false, or leave it out.")
    group = recipe.group_size
    if group is not None and not any(type(group) is int and group == size for size in GROUP_SIZES):
        listed = ", ".join(str(item) for item in GROUP_SIZES)
        raise UsageError(f"--group-size cannot be {_shown(group)}: choose one of {listed} (-1 is a whole row).")
    alpha = 1.0 if recipe.alpha is None else recipe.alpha
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
        raise UsageError(
            f"--alpha cannot be {_shown(recipe.alpha)}: give a positive number, or leave it out for alpha = rank."
        )
    if recipe.revision is not None and (not isinstance(recipe.revision, str) or not recipe.revision):
        raise UsageError(
            f"--revision cannot be {_shown(recipe.revision)}: give a branch, a tag or a commit, as a string."
        )
    if parse_size(recipe.max_shard_size) < 1_000:
        raise UsageError(f"--max-shard-size {recipe.max_shard_size} is too small: give at least 1KB.")


def _check_calibration(recipe: Recipe) -> None:
    for name in ("calibrate", "calibration_hash"):
        value = getattr(recipe, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise UsageError(f"{name} cannot be {_shown(value)}: give a text.")
    if recipe.calibrate is not None and recipe.plain:
        raise UsageError("--calibrate weighs the fit of the adapter, which qlora and --iters 0 do not make: drop one.")
    if recipe.calibrate is not None and recipe.method == "qa-lora":
        raise UsageError("--calibrate has no weights for qa-lora's adapters, which see sums of inputs: drop one.")


def _check_budget(recipe: Recipe) -> None:
    """Bits, and what chooses them matrix by matrix."""
    bits, mix = recipe.bits, recipe.mix
    if not isinstance(mix, str) or (mix and mix not in MIXES):
        raise UsageError(f"--mix cannot be {_shown(mix)}: choose one of {', '.join(MIXES)}.")
    number = isinstance(bits, (int, float)) and not isinstance(bits, bool)
    if not number or not (BITS[0] <= bits <= BITS[-1] if mix else bits in BITS):
        listed = ", ".join(str(width) for width in BITS)
        raise UsageError(f"--bits cannot be {_shown(bits)}: choose one of {listed}, or a mean between them with --mix.")
    if mix == "paper" and recipe.target_size is None and bits > PAPER_WIDTHS[0]:
        raise UsageError(f"--mix paper gives 4 and 2 bits, so --bits {bits:g} is no mean of it: give 2 to 4.")
    if recipe.target_size is not None:
        if not isinstance(recipe.target_size, (str, int)) or isinstance(recipe.target_size, bool):
            raise UsageError(f"--target-size cannot be {_shown(recipe.target_size)}: give a size such as 6GB.")
        object.__setattr__(recipe, "target_size", str(recipe.target_size))
        parse_size(recipe.target_size)
    budget = recipe.rank_budget
    if budget is None:
        return
    if not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 1 <= budget < 2**31:
        raise UsageError(f"--rank-budget cannot be {_shown(budget)}: give a mean rank from 1 on.")


def _shown(value: object) -> str:
    """A value in a sentence; a YAML file can hold anything."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits
        return f"this {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
