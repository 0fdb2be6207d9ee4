"""Every option that commands share, once, with its help panel. Long panels have modules of their own.

Defaults are `Recipe`'s; None means "not given", so that a YAML recipe can speak.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from loftq_cli.cli.options.base import DEFAULTS, FIELD_HELPS, RUN, SHOW, WHERE, choice_of, option, recipe_option
from loftq_cli.cli.options.grid import (
    Bits,
    BlockSize,
    DataTypeOption,
    Dequantize,
    DoubleQuant,
    Dtype,
    Format,
    GroupSize,
    Mix,
    Scale,
    Symmetric,
    TargetSize,
    Weigh,
)
from loftq_cli.cli.options.method import (
    Alpha,
    Calibrate,
    CalibrateKind,
    CalibrationTokens,
    Init,
    Iters,
    KeepLast,
    Levels,
    Method,
    Rank,
    RankBudget,
    Seed,
    Svd,
)
from loftq_cli.cli.options.source import (
    AllowNonfinite,
    Config,
    Embeddings,
    Exclude,
    Experts,
    Include,
    LmHead,
    MetaVersion,
    Model,
    Revision,
    RuleOption,
    Stream,
)

__all__ = [
    "FIELD_HELPS",
    "AllowNonfinite",
    "Alpha",
    "Bits",
    "BlockSize",
    "Calibrate",
    "CalibrateKind",
    "CalibrationTokens",
    "Config",
    "DataTypeOption",
    "Debug",
    "Dequantize",
    "Device",
    "DoubleQuant",
    "Dtype",
    "Embeddings",
    "Exclude",
    "Experts",
    "Format",
    "GroupSize",
    "Include",
    "Init",
    "Iters",
    "Json",
    "KeepLast",
    "Levels",
    "LmHead",
    "MaxMemory",
    "MaxShardSize",
    "MetaVersion",
    "Method",
    "Mix",
    "Model",
    "NumProcesses",
    "Output",
    "Overwrite",
    "PushTo",
    "Quiet",
    "Rank",
    "RankBudget",
    "Revision",
    "RuleOption",
    "Scale",
    "Seed",
    "Stream",
    "Svd",
    "Symmetric",
    "TargetSize",
    "Verbose",
    "Weigh",
    "choice_of",
    "option",
    "recipe_values",
]

Output = Annotated[
    Optional[Path],
    option("--output", "-o", help="Directory to write.", shown="./MODEL-METHOD-BITSbit-rRANK", panel=WHERE),
]
MaxShardSize = Annotated[
    Optional[str], recipe_option("max_shard_size", "Largest weight file.", panel=WHERE, metavar="SIZE")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a finished output, or drop an unfinished one.", rich_help_panel=WHERE),
]
PushTo = Annotated[
    Optional[str],
    option(
        "--push-to",
        help="Push the finished conversion to this repository on the Hub, as `loftq push` does.",
        metavar="ORG/NAME",
        panel=WHERE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to compute: auto is all GPUs if there are any.",
        rich_help_panel=RUN,
        metavar="auto|cpu|cuda|cuda:N",
    ),
]
NumProcesses = Annotated[
    Optional[int],
    option(
        "--num-processes",
        help="Workers that share the matrices.",
        shown="one a GPU, or one on the CPU",
        metavar="N",
        panel=RUN,
    ),
]
MaxMemory = Annotated[
    Optional[str],
    option(
        "--max-memory",
        help="Memory to stay below: nothing is read ahead where that would not fit.",
        metavar="SIZE",
        panel=RUN,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", rich_help_panel=SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.", rich_help_panel=SHOW)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every matrix and tensor.", rich_help_panel=SHOW)]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks instead of sentences.", rich_help_panel=SHOW)]


def recipe_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's fields among a command's parameters."""
    return {
        name: values[name] or None if isinstance(values[name], list) else values[name]
        for name in DEFAULTS
        if name in values
    }
