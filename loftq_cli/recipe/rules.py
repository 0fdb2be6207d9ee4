"""Rules and sizes as users write them: `REGEX=SPEC`, `5GB`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loftq_cli.errors import UsageError
from loftq_cli.machine.patterns import bounded_pattern
from loftq_cli.recipe.choices import BITS

_FEWEST_BYTES = 1_000  # without a unit; a smaller number is one of GB or MB
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Rule:
    """`REGEX=SPEC`: the settings of modules whose path contains a match of the regex; the first matching rule applies.

    Attributes:
        bits, rank: overrides of the recipe's values; None for no override.
        keep: `skip` leaves the matrix unchanged; `dense` keeps it in full precision but adds an adapter that starts at
            zero; "" quantizes it.
    """

    pattern: str
    bits: int | None = None
    rank: int | None = None
    keep: str = ""

    @property
    def exact(self) -> bool:
        """True if the pattern matches exactly one module, as written by `exact_rule`."""
        module = re.sub(r"\\(.)", r"\1", self.pattern[1:-1])
        return self.pattern == f"^{re.escape(module)}$"

    def matches(self, module: str) -> bool:
        """Return True if the regex is found in a module's path.

        Raises:
            LoftqError: the search takes too long.
        """
        return bounded_pattern(self.pattern).search(module)


def parse_rule(text: str) -> Rule:
    """`'down_proj=4:32'`, `'layers\\.0\\.=skip'`, `'lm_head=dense'` → `Rule`.

    Raises:
        UsageError: the text is not a valid rule.
    """
    pattern, separator, spec = text.rpartition("=")
    try:
        bounded_pattern(pattern)
    except ValueError as error:
        raise UsageError(f"the rule '{text:.200}' has an invalid regular expression ({error}): correct it.") from error
    if not separator or not pattern:
        raise UsageError(f"invalid rule '{text:.200}': write REGEX=SPEC, where SPEC is bits, bits:rank, skip or dense.")
    if spec in ("skip", "dense"):
        return Rule(pattern, keep=spec)
    match = re.fullmatch(r"(\d)(?::(\d{1,9}))?", spec, re.ASCII)
    if match is None or int(match[1]) not in BITS or (match[2] and int(match[2]) == 0):
        raise UsageError(
            f"invalid SPEC '{spec:.80}' in the rule '{text:.200}': write 2, 3, 4 or 8, bits:rank, skip or dense."
        )
    return Rule(pattern, bits=int(match[1]), rank=int(match[2]) if match[2] else None)


def exact_rule(module: str, bits: int, rank: int | None = None) -> str:
    """Return the rule that sets the bits, and the rank if given, of one module."""
    return f"^{re.escape(module)}$={bits}" + (f":{rank}" if rank else "")


def parse_size(text: str | int) -> int:
    """`'5GB'`, `'500MiB'`, `'1000000'` → bytes.

    Raises:
        UsageError: the text is not a valid size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text), re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"invalid size '{text:.80}': write a number with KB, MB, GB, KiB, MiB or GiB.")
    if not match[2] and float(match[1]) < _FEWEST_BYTES:
        raise UsageError(f"the size '{text}' has no unit: write {match[1]}GB or {match[1]}MB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
