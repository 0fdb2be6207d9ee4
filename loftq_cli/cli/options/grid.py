"""Options of the grid that weights are rounded to, and of the container."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Optional

from loftq_cli.cli.options.base import GRID, recipe_option
from loftq_cli.recipe import choices as c

_option = partial(recipe_option, panel=GRID)

Bits = Annotated[Optional[float], _option("bits", "Bits of a weight's code, or a mean such as 2.5.", choices=c.BITS)]
Mix = Annotated[
    Optional[str],
    _option(
        "mix",
        "Widths matrix by matrix: the least error under the budget (optimal), or 4 bits in the first layers and 2 in "
        "the rest (paper).",
        choices=c.MIXES,
        show="optimal for a mean or a size",
    ),
]
TargetSize = Annotated[
    Optional[str], _option("target_size", "Size of the backbone as the budget of --mix.", metavar="SIZE")
]
Weigh = Annotated[
    Optional[str], _option("weigh", "What optimal minimises: squared error relative to each matrix, or as it is.")
]
DataTypeOption = Annotated[
    Optional[str],
    _option(
        "data_type",
        "Levels: NormalFloat, its symmetric variant, evenly spaced (8 bits are always uniform), or integers with "
        "fitted scales; auto is int for the containers of integers, else nf.",
    ),
]
BlockSize = Annotated[Optional[int], _option("block_size", "Weights that share a scale.")]
GroupSize = Annotated[
    Optional[int],
    _option("group_size", "The same for integers; -1 is a whole row.", choices=c.GROUP_SIZES, show="64, gguf 32"),
]
Scale = Annotated[
    Optional[str],
    _option(
        "scale",
        "Scales by the largest magnitude, by the range, or of least squared error; auto is mse for integers, absmax "
        "for codebooks.",
    ),
]
Symmetric = Annotated[
    Optional[bool],
    _option(
        "symmetric",
        "Integers without or with a zero of each group.",
        show="symmetric in compressed-tensors and gguf",
        flag="--symmetric/--asymmetric",
    ),
]
DoubleQuant = Annotated[
    Optional[bool],
    _option("double_quant", "Quantize the scales too (bnb).", show="no", flag="--double-quant/--no-double-quant"),
]
Dequantize = Annotated[
    Optional[bool],
    _option(
        "dequantize",
        "Let transformers unpack a compressed-tensors model while loading (needed to train), or keep it packed.",
        show="dequantize",
        flag="--dequantize/--compressed",
    ),
]
Format = Annotated[Optional[str], _option("format", "Container: auto takes bnb for 4-bit nf, else packed.")]
Dtype = Annotated[Optional[str], _option("dtype", "Type the model is loaded in; auto keeps the source's.")]
