"""The options that commands share, with their help panels. Options of the recipe are generated from its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loftq_cli.cli.options.base import choice_of, option, plain
from loftq_cli.cli.options.from_recipe import FromRecipe, with_recipe_options
from loftq_cli.recipe.panels import RUN, SHOW, WHAT, WHERE

__all__ = [
    "Config",
    "Debug",
    "Device",
    "Force",
    "FromRecipe",
    "Json",
    "MaxMemory",
    "Model",
    "NumProcesses",
    "Output",
    "Overwrite",
    "PushTo",
    "Quiet",
    "Stream",
    "Verbose",
    "choice_of",
    "option",
    "with_recipe_options",
]

Model = Annotated[
    Optional[str],
    typer.Argument(
        metavar="MODEL",
        help=plain("Directory of a checkpoint, or org/name[@revision] on the Hub: safetensors, .bin or Meta's."),
    ),
]
Config = Annotated[Optional[Path], option("--config", help="YAML recipe; flags override it.", panel=WHAT)]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read a model on the Hub in pieces, without keeping a copy of its weights.",
        rich_help_panel=WHAT,
    ),
]
Output = Annotated[
    Optional[Path],
    option("--output", "-o", help="Directory to write to.", shown="./MODEL-METHOD-BITSbit-rRANK", panel=WHERE),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a finished output, or discard an unfinished one.", rich_help_panel=WHERE),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Use an adapter even if it was trained on another conversion.", rich_help_panel=RUN),
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
        help="Device to compute on; auto is all GPUs, or the CPU if there are none.",
        rich_help_panel=RUN,
        metavar="auto|cpu|cuda|cuda:N",
    ),
]
NumProcesses = Annotated[
    Optional[int],
    option(
        "--num-processes",
        help="Number of worker processes that share the matrices.",
        shown="one per GPU, or one on the CPU",
        metavar="N",
        panel=RUN,
    ),
]
MaxMemory = Annotated[
    Optional[str],
    option(
        "--max-memory",
        help="Limit on memory: nothing is read ahead that would exceed it.",
        metavar="SIZE",
        panel=RUN,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.", rich_help_panel=SHOW)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=SHOW)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every matrix and tensor.", rich_help_panel=SHOW)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=SHOW)]
