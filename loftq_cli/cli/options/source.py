"""Options of what is converted: the source, and which of its matrices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from loftq_cli.cli.options.base import WHAT, option, recipe_option

_option = partial(recipe_option, panel=WHAT)

Model = Annotated[
    Optional[str],
    typer.Argument(
        metavar="MODEL",
        help="Directory of a checkpoint, or org/name[@revision] on the Hub: safetensors, .bin or Meta's.",
    ),
]
Config = Annotated[Optional[Path], option("--config", help="YAML recipe; flags win over it.", panel=WHAT)]
Revision = Annotated[Optional[str], _option("revision", "Branch, tag or commit of a model on the Hub.", show="main")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read a model on the Hub piece by piece and keep no copy of its weights.",
        rich_help_panel=WHAT,
    ),
]
Include = Annotated[
    Optional[list[str]], _option("include", "Only modules matching this glob (repeatable).", metavar="GLOB")
]
Exclude = Annotated[
    Optional[list[str]], _option("exclude", "Leave modules matching this glob alone (repeatable).", metavar="GLOB")
]
RuleOption = Annotated[
    Optional[list[str]],
    _option(
        "rule",
        "What modules matching a regex get: bits, bits:rank, skip (left alone) or dense (full precision with an "
        "adapter that starts at zero). Repeatable, the first match wins.",
        metavar="REGEX=SPEC",
    ),
]
Embeddings = Annotated[
    Optional[str],
    _option("embeddings", "Input embedding: keep it, quantize it, or quantize it and give it an adapter (adapt)."),
]
LmHead = Annotated[Optional[str], _option("lm_head", "Output head: keep it or quantize it.")]
Experts = Annotated[
    Optional[str],
    _option(
        "experts",
        "Experts of a mixture: quantize them where the container can hold them, require that it can, or keep them.",
    ),
]
AllowNonfinite = Annotated[
    Optional[bool],
    _option(
        "allow_nonfinite",
        "Leave a matrix that holds NaN or infinity in full precision instead of stopping; every matrix is read once "
        "more beforehand.",
        show="",
    ),
]
MetaVersion = Annotated[
    Optional[str],
    _option("meta_version", "Which Llama Meta's consolidated.*.pth are, where params.json leaves it open."),
]
