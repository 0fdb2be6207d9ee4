"""The valid values of recipe fields."""

from __future__ import annotations

from loftq_cli.formats import FORMATS
from loftq_cli.numerics.grids.codebooks import DATA_TYPES
from loftq_cli.numerics.grids.codebooks import LEVELS as LEVELS

BITS = (2, 3, 4, 8)
MIXES = ("optimal", "paper")
PAPER_WIDTHS = (4, 2)  # of the first layers and of the rest (LoftQ section 4)
WEIGHINGS = ("relative", "absolute")
BLOCK_SIZES = (32, 64, 128, 256)
GROUP_SIZES = (-1, 32, 64, 128, 256)
DATA_TYPE_CHOICES = ("auto", *DATA_TYPES, "int")
SCALES = ("auto", "absmax", "minmax", "mse")
METHODS = ("loftq", "refined", "ldlq", "qlora", "qa-lora")
ITERS = {"loftq": 5, "refined": 16, "ldlq": 4, "qlora": 5, "qa-lora": 5}  # default by method
INITS = ("svd", "zero")
FITTING = ("refined", "ldlq")  # methods that fit scales, and levels if the container can store them
STARTS = ("refined", "ldlq", "qa-lora")  # methods whose start can be chosen
AUTO = "auto"
FORMAT_NAMES = (AUTO, *FORMATS)
EMBEDDINGS = ("keep", "quantize", "adapt")
LM_HEADS = ("keep", "quantize")
EXPERTS = ("quantize", "require", "keep")
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
SVDS = ("fast", "exact")
CALIBRATE_KINDS = ("diagonal", "full")
CALIBRATED = "ldlq"  # the method that needs a calibration text
META_VERSIONS = ("auto", "1", "2", "code", "3", "3.1", "3.2")
