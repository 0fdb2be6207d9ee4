"""Codebooks: the level of each code, in units of the block's absmax.

NormalFloat levels are the published ones (QLoRA, arXiv 2305.14314 appendix E; LoftQ's `create_normal_map` with offset
0.9677083), written out to avoid a dependency on scipy. 4-bit NormalFloat is the table of bitsandbytes, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from loftq_cli.errors import UsageError

DataType = Literal["nf", "nf-sym", "uniform"]
DATA_TYPES: tuple[str, ...] = get_args(DataType)
# `numerics.grids.trellis`, which has no codebook: bits of a state. What a name means never changes; files record it.
TRELLIS = {"trellis": 10, "trellis-fast": 8}
LEVELS = ("nf", "nf4-subset", "fitted", *TRELLIS)

_NF: dict[int, tuple[float, ...]] = {
    2: (-1.0, 0.0, 0.33791524171829224, 1.0),
    3: (
        -1.0, -0.4786292016506195, -0.217141792178154, 0.0,
        0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0,
    ),
    4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip

_NF_SYM_POSITIVE: dict[int, tuple[float, ...]] = {
    2: (0.25256848335266113, 1.0),
    3: (0.1029876172542572, 0.3192371726036072, 0.5762974619865417, 1.0),
    4: (
        0.04618821293115616, 0.13959170877933502, 0.2362464815378189, 0.3389681875705719,
        0.45191213488578796, 0.5823284983634949, 0.7461439371109009, 1.0,
    ),
}  # fmt: skip


# Subsets of the NF4 codes, both ends included, with nearly the least squared error at fitted scales on blocks of
# Gaussian numbers and of trained matrices (scripts/study/subsets.py): within 1 to 3 % of levels fitted to each matrix.
_NF4_SUBSET: dict[int, tuple[int, ...]] = {2: (0, 4, 10, 15), 3: (0, 2, 4, 6, 8, 11, 13, 15), 4: tuple(range(16))}


@dataclass(frozen=True)
class Codebook:
    """The `2**bits` levels of a code, ascending, within [-1, 1].

    `fitted` levels are only the start of a fit for each matrix.
    """

    data_type: str
    bits: int
    levels: tuple[float, ...]

    @property
    def fitted(self) -> bool:
        """True if levels are fitted to each matrix."""
        return self.data_type == "fitted"

    def __post_init__(self) -> None:
        assert len(self.levels) == 2**self.bits, "a codebook must have one level for each code"
        assert list(self.levels) == sorted(self.levels), "levels must ascend, so that midpoints separate them"


def codebook(data_type: str, bits: int) -> Codebook:
    """Return the codebook of a data type at a bit width.

    `nf` and `nf-sym` have 2, 3 or 4 bits; `uniform` has 2, 3, 4 or 8 (LoftQ section 3.1: levels evenly spaced on the
    absmax grid, ±1 and ±1/3 at 2 bits). NormalFloat was never defined at 8 bits, where evenly spaced levels are as
    good, so 8 bits is always `uniform`, also in place of a trellis; the result's `data_type` reports that.

    Two more are for fitted scales at 2, 3 or 4 bits: `nf4-subset`, a nearly optimal subset of the NF4 levels, which a
    bitsandbytes file can store; and `fitted`, levels fitted to each matrix, starting from that subset.

    Raises:
        UsageError: there is no such codebook.
    """
    if data_type not in (*DATA_TYPES, *LEVELS) or (data_type in TRELLIS and bits != 8):
        raise UsageError(f"there is no data type '{data_type}': choose one of {', '.join(DATA_TYPES)}.")
    if bits not in (2, 3, 4, 8):
        raise UsageError(f"{bits} bits is not a width of '{data_type}': choose 2, 3, 4 or 8.")
    if data_type == "uniform" or bits == 8:
        top = 2**bits - 1
        return Codebook("uniform", bits, tuple((2 * i - top) / top for i in range(top + 1)))
    if data_type == "nf":
        return Codebook("nf", bits, _NF[bits])
    if data_type in ("nf4-subset", "fitted"):
        return Codebook(data_type, bits, tuple(_NF[4][code] for code in _NF4_SUBSET[bits]))
    positive = _NF_SYM_POSITIVE[bits]
    return Codebook("nf-sym", bits, tuple(-level for level in reversed(positive)) + positive)
