"""What a recipe's fields may say, each alone and together; every refusal is a sentence about a flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.errors import UsageError
from loftq_cli.recipe.choices import BITS, CHOICES, GROUP_SIZES, LEAST, MIXES, PAPER_WIDTHS, STARTS
from loftq_cli.recipe.rules import parse_size

if TYPE_CHECKING:
    from loftq_cli.recipe.model import Recipe


def check_text(recipe: Recipe) -> None:
    """YAML can hold halves of characters and zeros, which neither files nor paths can.

    Raises:
        UsageError: a text holds one.
    """
    for name, value in recipe.as_dict().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (text.encode("utf-8", "replace").decode() != text or "\0" in text):
                raise UsageError(f"{name} holds a character that is none: correct {text!r:.80}.")


def check(recipe: Recipe) -> None:
    """Refuse values that cannot be meant; nothing is changed.

    Raises:
        UsageError: of the first that is wrong.
    """
    _check_budget(recipe)
    _check_tables(recipe)
    _check_calibration(recipe)
    _check_method(recipe)
    _check_switches(recipe)
    _check_rest(recipe)


def _check_tables(recipe: Recipe) -> None:
    """What `CHOICES` and `LEAST` say."""
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


def _check_method(recipe: Recipe) -> None:
    """What only some methods have."""
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


def _check_switches(recipe: Recipe) -> None:
    for name in ("keep_last", "allow_nonfinite", "double_quant", "dequantize"):
        if not isinstance(getattr(recipe, name), bool):
            raise UsageError(f"{name} cannot be {_shown(getattr(recipe, name))}: give true or false.")
    if recipe.symmetric is not None and not isinstance(recipe.symmetric, bool):
        raise UsageError(f"symmetric cannot be {_shown(recipe.symmetric)}: give true or false, or leave it out.")


def _check_rest(recipe: Recipe) -> None:
    """Numbers and texts with rules of their own."""
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
