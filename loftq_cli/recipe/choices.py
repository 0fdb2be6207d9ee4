"""What the fields of a recipe may be. Checks, command line and JSON schema read the same tables."""

from __future__ import annotations

from typing import Any

from loftq_cli.formats import FORMATS
from loftq_cli.numerics.grids.codebooks import DATA_TYPES, LEVELS

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
AUTO = "auto"
FORMAT_NAMES = (AUTO, *FORMATS)
EMBEDDINGS = ("keep", "quantize", "adapt")
LM_HEADS = ("keep", "quantize")
EXPERTS = ("quantize", "require", "keep")
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
SVDS = ("fast", "exact")
CALIBRATE_KINDS = ("diagonal", "full")
META_VERSIONS = ("auto", "1", "2", "code", "3", "3.1", "3.2")

# By field: what it may be, and the least a whole number may be.
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
