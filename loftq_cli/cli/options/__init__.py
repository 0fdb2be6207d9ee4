"""Every option that commands share, once, with its help panel. Those of the recipe are made from its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loftq_cli.cli.options.base import choice_of, option
from loftq_cli.cli.options.from_recipe import FromRecipe, with_recipe_options
from loftq_cli.recipe.panels import RUN, SHOW, WHAT, WHERE

__all__ = [
    "Config",
    "Debug",
    "Device",
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
        help="Directory of a checkpoint, or org/name[@revision] on the Hub: safetensors, .bin or Meta's.",
    ),
]
Config = Annotated[Optional[Path], option("--config", help="YAML recipe; flags win over it.", panel=WHAT)]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read a model on the Hub piece by piece and keep no copy of its weights.",
        rich_help_panel=WHAT,
    ),
]
Output = Annotated[
    Optional[Path],
    option("--output", "-o", help="Directory to write.", shown="./MODEL-METHOD-BITSbit-rRANK", panel=WHERE),
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
