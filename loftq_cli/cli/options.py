"""Every option once, with its help panel. Defaults are `Recipe`'s; None means "not given", so that a YAML recipe can
speak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from loftq_cli import recipe_choices as c
from loftq_cli.recipe import recipe_fields

_DEFAULTS = recipe_fields()
FIELD_HELPS: dict[str, str] = {}  # what is said of each recipe field, for the schema as well
_WHAT, _WHERE, _GRID, _LOFTQ, _RUN, _SHOW = (
    "What to convert",
    "Output",
    "Quantization",
    "LoftQ",
    "Running",
    "Showing",
)


def _default(name: str) -> str:
    value = _DEFAULTS[name]
    return str(value) if value not in (None, ()) else ""


def _option(field: str, flag: str, help: str, panel: str, *, choices: tuple[object, ...] = (), **more: Any) -> Any:
    """An option of the recipe field `field`: its default stands in the help, its choices complete in the shell."""
    FIELD_HELPS[field] = help
    shown = more.pop("show", _default(field))
    values = [str(choice) for choice in choices]
    if values:
        more |= {
            "metavar": "|".join(values),
            "autocompletion": lambda incomplete: [value for value in values if value.startswith(incomplete)],
        }
    return typer.Option(flag, help=_with_default(help, shown), rich_help_panel=panel, show_default=False, **more)


def _with_default(help: str, shown: str) -> str:
    # Typer would put a default that is only text in brackets of its own: "[default: (16)]".
    return f"{help} [dim]\\[default: {shown}][/]" if shown else help


Model = Annotated[
    Optional[str],
    typer.Argument(
        metavar="MODEL",
        help="Directory of a checkpoint, or org/name[@revision] on the Hub: safetensors, .bin or Meta's.",
    ),
]
Output = Annotated[
    Optional[Path],
    typer.Option(
        "--output",
        "-o",
        help=_with_default("Directory to write.", "./MODEL-METHOD-BITSbit-rRANK"),
        rich_help_panel=_WHERE,
        show_default=False,
    ),
]
Config = Annotated[
    Optional[Path],
    typer.Option("--config", help="YAML recipe; flags win over it.", rich_help_panel=_WHAT, show_default=False),
]
Revision = Annotated[
    Optional[str],
    _option("revision", "--revision", "Branch, tag or commit of a model on the Hub.", _WHAT, show="main"),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read a model on the Hub piece by piece and keep no copy of its weights.",
        rich_help_panel=_WHAT,
    ),
]
Include = Annotated[
    Optional[list[str]],
    _option("include", "--include", "Only modules matching this glob (repeatable).", _WHAT, metavar="GLOB"),
]
Exclude = Annotated[
    Optional[list[str]],
    _option("exclude", "--exclude", "Leave modules matching this glob alone (repeatable).", _WHAT, metavar="GLOB"),
]
RuleOption = Annotated[
    Optional[list[str]],
    _option(
        "rule",
        "--rule",
        "What modules matching a regex get: bits, bits:rank, skip (left alone) or dense (full precision with an "
        "adapter that starts at zero). Repeatable, the first match wins.",
        _WHAT,
        metavar="REGEX=SPEC",
    ),
]
Embeddings = Annotated[
    Optional[str],
    _option(
        "embeddings",
        "--embeddings",
        "Input embedding: keep it, quantize it, or quantize it and give it an adapter (adapt).",
        _WHAT,
        choices=c.EMBEDDINGS,
    ),
]
LmHead = Annotated[
    Optional[str],
    _option("lm_head", "--lm-head", "Output head: keep it or quantize it.", _WHAT, choices=c.LM_HEADS),
]
Experts = Annotated[
    Optional[str],
    _option(
        "experts",
        "--experts",
        "Experts of a mixture: quantize them where the container can hold them, require that it can, or keep them.",
        _WHAT,
        choices=c.EXPERTS,
    ),
]
AllowNonfinite = Annotated[
    Optional[bool],
    _option(
        "allow_nonfinite",
        "--allow-nonfinite",
        "Leave a matrix that holds NaN or infinity in full precision instead of stopping; every matrix is read once "
        "more beforehand.",
        _WHAT,
        show="",
    ),
]
MetaVersion = Annotated[
    Optional[str],
    _option(
        "meta_version",
        "--meta-version",
        "Which Llama Meta's consolidated.*.pth are, where params.json leaves it open.",
        _WHAT,
        choices=c.META_VERSIONS,
    ),
]
Bits = Annotated[
    Optional[float],
    _option("bits", "--bits", "Bits of a weight's code, or a mean such as 2.5.", _GRID, choices=c.BITS),
]
Mix = Annotated[
    Optional[str],
    _option(
        "mix",
        "--mix",
        "Widths matrix by matrix: the least error under the budget (optimal), or 4 bits in the first layers and 2 in "
        "the rest (paper).",
        _GRID,
        choices=c.MIXES,
        show="optimal for a mean or a size",
    ),
]
TargetSize = Annotated[
    Optional[str],
    _option("target_size", "--target-size", "Size of the backbone as the budget of --mix.", _GRID, metavar="SIZE"),
]
Weigh = Annotated[
    Optional[str],
    _option(
        "weigh",
        "--weigh",
        "What optimal minimises: squared error relative to each matrix, or as it is.",
        _GRID,
        choices=c.WEIGHINGS,
    ),
]
DataTypeOption = Annotated[
    Optional[str],
    _option(
        "data_type",
        "--data-type",
        "Levels: NormalFloat, its symmetric variant, evenly spaced (8 bits are always uniform), or integers with "
        "fitted scales; auto is int for the containers of integers, else nf.",
        _GRID,
        choices=c.DATA_TYPE_CHOICES,
    ),
]
BlockSize = Annotated[
    Optional[int],
    _option("block_size", "--block-size", "Weights that share a scale.", _GRID, choices=c.BLOCK_SIZES),
]
GroupSize = Annotated[
    Optional[int],
    _option(
        "group_size",
        "--group-size",
        "The same for integers; -1 is a whole row.",
        _GRID,
        choices=c.GROUP_SIZES,
        show="64, gguf 32",
    ),
]
Scale = Annotated[
    Optional[str],
    _option(
        "scale",
        "--scale",
        "Scales by the largest magnitude, by the range, or of least squared error; auto is mse for integers, absmax "
        "for codebooks.",
        _GRID,
        choices=c.SCALES,
    ),
]
Symmetric = Annotated[
    Optional[bool],
    _option(
        "symmetric",
        "--symmetric/--asymmetric",
        "Integers without or with a zero of each group.",
        _GRID,
        show="symmetric in compressed-tensors and gguf",
    ),
]
DoubleQuant = Annotated[
    Optional[bool],
    _option(
        "double_quant",
        "--double-quant/--no-double-quant",
        "Quantize the scales too (bnb).",
        _GRID,
        show="no",
    ),
]
Dequantize = Annotated[
    Optional[bool],
    _option(
        "dequantize",
        "--dequantize/--compressed",
        "Let transformers unpack a compressed-tensors model while loading (needed to train), or keep it packed.",
        _GRID,
        show="dequantize",
    ),
]
Format = Annotated[
    Optional[str],
    _option(
        "format",
        "--format",
        "Container: auto takes bnb for 4-bit nf, else packed.",
        _GRID,
        choices=c.FORMAT_NAMES,
    ),
]
Dtype = Annotated[
    Optional[str],
    _option(
        "dtype",
        "--dtype",
        "Type the model is loaded in; auto keeps the source's.",
        _GRID,
        choices=c.DTYPE_CHOICES,
    ),
]
Method = Annotated[
    Optional[str],
    _option(
        "method",
        "--method",
        "loftq alternates as published; refined also fits scales, starts from the SVD and feeds errors back; qlora "
        "quantizes plainly and starts the adapter at zero; qa-lora pools the adapter's input over integer groups "
        "(--group-size), so that it merges into their zeros.",
        _LOFTQ,
        choices=c.METHODS,
    ),
]
Init = Annotated[
    Optional[str],
    _option(
        "init",
        "--init",
        "Start of refined (the rank-r SVD of the weights, or a zero adapter as LoftQ's) and of qa-lora (the low-rank "
        "part of the error, or zero over a plainly quantized backbone).",
        _LOFTQ,
        choices=c.INITS,
        show="svd",
    ),
]
Rank = Annotated[Optional[int], _option("rank", "--rank", "Rank of the adapter.", _LOFTQ)]
RankBudget = Annotated[
    Optional[float],
    _option(
        "rank_budget",
        "--rank-budget",
        "Mean rank: more of it goes where the error's singular values are large.",
        _LOFTQ,
        metavar="MEAN",
    ),
]
Iters = Annotated[
    Optional[int],
    _option("iters", "--iters", "Alternating steps T; 0 is qlora.", _LOFTQ, show="5; refined: 16"),
]
Levels = Annotated[
    Optional[str],
    _option(
        "levels",
        "--levels",
        "Levels of refined: NormalFloat, the best 4 or 8 of NF4's for 2 or 3 bits (fit bnb files), or fitted to each "
        "matrix (packed only).",
        _LOFTQ,
        choices=c.LEVELS,
        show="those of --data-type",
    ),
]
Alpha = Annotated[
    Optional[float],
    _option(
        "alpha", "--alpha", "lora_alpha; B is divided by alpha/rank, so the start is the same.", _LOFTQ, show="rank"
    ),
]
KeepLast = Annotated[
    Optional[bool],
    _option(
        "keep_last",
        "--keep-last/--keep-best",
        "Keep the paper's literal last iterate, or the one with the smallest residual.",
        _LOFTQ,
        show="keep-best",
    ),
]
Svd = Annotated[
    Optional[str],
    _option("svd", "--svd", "Low-rank step: fast (within 0.1 % of exact) or the full SVD.", _LOFTQ, choices=c.SVDS),
]
Calibrate = Annotated[
    Optional[str],
    _option(
        "calibrate",
        "--calibrate",
        "Weigh errors by what the layers see on this text (.txt, .jsonl, .json, .parquet or a directory of them), or "
        "by second moments collected before (.safetensors).",
        _LOFTQ,
        metavar="FILE",
    ),
]
# No flag: it is written to loftq.yaml.
FIELD_HELPS["calibration_hash"] = "sha256 of what calibrate names, as loftq writes it; another file is then refused."
CalibrationTokens = Annotated[
    Optional[int],
    _option("calibration_tokens", "--calibration-tokens", "How much of the text to run.", _LOFTQ, metavar="N"),
]
CalibrateKind = Annotated[
    Optional[str],
    _option(
        "calibrate_kind",
        "--calibrate-kind",
        "Weigh by each input's own variance, or by all covariances (slower, more disk).",
        _LOFTQ,
        choices=c.CALIBRATE_KINDS,
    ),
]
Seed = Annotated[Optional[int], _option("seed", "--seed", "Seed of every random start.", _LOFTQ)]
MaxShardSize = Annotated[
    Optional[str], _option("max_shard_size", "--max-shard-size", "Largest weight file.", _WHERE, metavar="SIZE")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a finished output, or drop an unfinished one.", rich_help_panel=_WHERE),
]
PushTo = Annotated[
    Optional[str],
    typer.Option(
        "--push-to",
        help="Push the finished conversion to this repository on the Hub, as `loftq push` does.",
        rich_help_panel=_WHERE,
        metavar="ORG/NAME",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to compute: auto is all GPUs if there are any.",
        rich_help_panel=_RUN,
        metavar="auto|cpu|cuda|cuda:N",
    ),
]
NumProcesses = Annotated[
    Optional[int],
    typer.Option(
        "--num-processes",
        help=_with_default("Workers that share the matrices.", "one a GPU, or one on the CPU"),
        rich_help_panel=_RUN,
        metavar="N",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    Optional[str],
    typer.Option(
        "--max-memory",
        help="Memory to stay below: nothing is read ahead where that would not fit.",
        rich_help_panel=_RUN,
        metavar="SIZE",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", rich_help_panel=_SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.", rich_help_panel=_SHOW)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every matrix and tensor.", rich_help_panel=_SHOW)]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks instead of sentences.", rich_help_panel=_SHOW)]


def recipe_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's fields among a command's parameters."""
    return {
        name: values[name] or None if isinstance(values[name], list) else values[name]
        for name in _DEFAULTS
        if name in values
    }
