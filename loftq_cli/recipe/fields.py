"""The fields of a recipe, each declared once.

A field's flag, YAML key, JSON schema, Python keyword and line in the documentation are generated from its declaration.
After a change, run `python scripts/generate.py` to update the generated files.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from loftq_cli.formats import FORMATS
from loftq_cli.formats.container import Container
from loftq_cli.recipe import choices as c
from loftq_cli.recipe.field import Choices, Help
from loftq_cli.recipe.kinds import (
    AsText,
    From0,
    From1,
    KnownGroup,
    KnownMix,
    Mean,
    NotEmpty,
    PathText,
    Rules,
    ShardSize,
    SizeText,
    Text,
    TextList,
    UnsetIsNone,
    ValidSize,
)
from loftq_cli.recipe.panels import GRID, LOFTQ, WHAT, WHERE

_WIDTHS = ", ".join(str(width) for width in c.BITS)
_GROUPS = ", ".join(str(size) for size in c.GROUP_SIZES)
_DEFAULT_GROUP = str(Container.group_size)
_OTHER_GROUPS = [
    f"{name} {item.group_size}" for name, item in FORMATS.items() if item.group_size != Container.group_size
]
_SYMMETRIC = " and ".join(name for name, item in FORMATS.items() if item.symmetric)


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class RecipeFields:
    """Every setting of a conversion, in the order of the help page and of loftq.yaml."""

    model: Annotated[Text, PathText, Help("Directory of a checkpoint, or org/name[@revision] on the Hub.")]
    _: dataclasses.KW_ONLY
    revision: Annotated[
        Text | None,
        NotEmpty,
        Help(
            "Branch, tag or commit of a model on the Hub.",
            WHAT,
            default="main",
            expects="give a branch, a tag or a commit, as a string",
        ),
    ] = None
    include: Annotated[
        tuple[Text, ...], TextList, Help("Quantize only modules matching this glob (repeatable).", WHAT, metavar="GLOB")
    ] = ()
    exclude: Annotated[
        tuple[Text, ...],
        TextList,
        Help("Leave modules matching this glob unchanged (repeatable).", WHAT, metavar="GLOB"),
    ] = ()
    rule: Annotated[
        tuple[Text, ...],
        TextList,
        Rules,
        Help(
            "Setting for modules matching a regex: bits, bits:rank, skip (left unchanged) or dense (full precision, "
            "with an adapter that starts at zero). Repeatable; the first match wins.",
            WHAT,
            metavar="REGEX=SPEC",
        ),
    ] = ()
    embeddings: Annotated[
        str,
        Choices(c.EMBEDDINGS),
        Help("Input embedding: keep it, quantize it, or quantize it and add an adapter (adapt).", WHAT),
    ] = "keep"
    lm_head: Annotated[str, Choices(c.LM_HEADS), Help("Output head: keep it or quantize it.", WHAT)] = "keep"
    experts: Annotated[
        str,
        Choices(c.EXPERTS),
        Help(
            "Experts of a mixture: quantize them if the container supports it, require that it does, or keep them.",
            WHAT,
        ),
    ] = "quantize"
    allow_nonfinite: Annotated[
        bool,
        Help(
            "Keep a matrix that contains NaN or infinity in full precision instead of stopping; every matrix is read "
            "one extra time first.",
            WHAT,
            flag="--allow-nonfinite",
            default="",
        ),
    ] = False
    meta_version: Annotated[
        str,
        AsText,
        Choices(c.META_VERSIONS),
        Help("Which Llama version Meta's consolidated.*.pth files are, if params.json does not tell.", WHAT),
    ] = "auto"
    bits: Annotated[
        int | float,
        Ge(c.BITS[0]),
        Le(c.BITS[-1]),
        Help(
            "Bits per weight, or a mean such as 2.5.",
            GRID,
            choices=c.BITS,
            expects=f"choose one of {_WIDTHS}, or a mean between them with --mix",
        ),
    ] = 4
    mix: Annotated[
        str,
        KnownMix,
        Help(
            "Choose bits per matrix: the least error within the budget (optimal), or 4 bits in the first layers and 2 "
            "in the rest (paper).",
            GRID,
            choices=c.MIXES,
            default="optimal for a mean or a size",
            expects=f"choose one of {', '.join(c.MIXES)}",
        ),
    ] = ""
    target_size: Annotated[
        Text | None,
        SizeText,
        ValidSize,
        Help("Size of the backbone, as the budget for --mix.", GRID, metavar="SIZE", expects="give a size such as 6GB"),
    ] = None
    weigh: Annotated[
        str,
        Choices(c.WEIGHINGS),
        Help("Error that optimal minimises: squared error relative to each matrix's norm, or absolute.", GRID),
    ] = "relative"
    data_type: Annotated[
        str,
        Choices(c.DATA_TYPE_CHOICES),
        Help(
            "Levels: NormalFloat, its symmetric variant, evenly spaced (8 bits are always uniform), or integers with "
            "fitted scales; auto is int for integer containers, else nf.",
            GRID,
        ),
    ] = "auto"
    block_size: Annotated[int, Choices(c.BLOCK_SIZES), Help("Number of weights that share a scale.", GRID)] = 64
    group_size: Annotated[
        int | None,
        KnownGroup,
        Help(
            "Number of weights that share a scale in integer containers; -1 is a whole row.",
            GRID,
            choices=c.GROUP_SIZES,
            default=", ".join([_DEFAULT_GROUP, *_OTHER_GROUPS]),
            expects=f"choose one of {_GROUPS} (-1 is a whole row)",
        ),
    ] = None
    scale: Annotated[
        str,
        Choices(c.SCALES),
        Help(
            "Choose scales by the largest magnitude, by the range, or for the least squared error; auto is mse for "
            "integers, absmax for codebooks.",
            GRID,
        ),
    ] = "auto"
    symmetric: Annotated[
        bool | None,
        Help(
            "Integers without or with a zero point for each group.",
            GRID,
            flag="--symmetric/--asymmetric",
            default=f"symmetric in {_SYMMETRIC}",
        ),
    ] = None
    double_quant: Annotated[
        bool, Help("Quantize the scales too (bnb).", GRID, flag="--double-quant/--no-double-quant", default="no")
    ] = False
    format: Annotated[
        str, Choices(c.FORMAT_NAMES), Help("Container: auto takes bnb for 4-bit nf, else packed.", GRID)
    ] = "auto"
    dequantize: Annotated[
        bool,
        Help(
            "Let transformers unpack a compressed-tensors model on loading (required for training), or keep it packed.",
            GRID,
            flag="--dequantize/--compressed",
            default="dequantize",
        ),
    ] = True
    dtype: Annotated[
        str, Choices(c.DTYPE_CHOICES), Help("Data type the model is loaded in; auto keeps that of the source.", GRID)
    ] = "auto"
    method: Annotated[
        str,
        Choices(c.METHODS),
        Help(
            "loftq alternates as published; refined also fits scales, starts from the SVD and feeds errors back; ldlq "
            "minimises the error of the layers' outputs on a text (--calibrate) and rounds column by column; qlora "
            "quantizes plainly and starts the adapter at zero; qa-lora pools the adapter's input over integer groups "
            "(--group-size), so that it merges into their zero points.",
            LOFTQ,
        ),
    ] = "loftq"
    init: Annotated[
        str | None,
        Choices(c.INITS),
        Help(
            "Starting point of refined and ldlq (the best low-rank part of the weights, or a zero adapter as in LoftQ) "
            "and of qa-lora (the low-rank part of the error, or zero over a plainly quantized backbone).",
            LOFTQ,
            default="svd",
        ),
    ] = None
    rank: Annotated[From1, Help("Rank of the adapter.", LOFTQ)] = 16
    rank_budget: Annotated[
        Mean,
        Help(
            "Mean rank: matrices whose error has large singular values get more of it.",
            LOFTQ,
            metavar="MEAN",
            expects="give a mean rank of at least 1",
        ),
    ] = None
    iters: Annotated[
        From0, UnsetIsNone, Help("Number of alternating steps T; 0 is qlora.", LOFTQ, default="5; refined: 16; ldlq: 4")
    ] = None  # type: ignore[assignment]  # `Recipe` sets it: it depends on the method
    levels: Annotated[
        str | None,
        Choices(c.LEVELS),
        Help(
            "Levels of refined and ldlq: NormalFloat, the best 4 or 8 of NF4's for 2 or 3 bits (fit bnb files), or "
            "fitted to each matrix (packed only). trellis and trellis-fast work with loftq and qlora too: levels that "
            "depend on earlier codes, closer at the same size and slower to find (2 to 4 bits; packed, dense).",
            LOFTQ,
            default="those of --data-type",
        ),
    ] = None
    alpha: Annotated[
        int | float | None,
        Gt(0),
        Lt(1e30),
        Help(
            "lora_alpha; B is divided by alpha/rank, so the starting point does not depend on it.",
            LOFTQ,
            default="rank",
            expects="give a positive number, or leave it out for alpha = rank",
        ),
    ] = None
    keep_last: Annotated[
        bool,
        Help(
            "Keep the last iterate, as in the paper, or the one with the smallest residual.",
            LOFTQ,
            flag="--keep-last/--keep-best",
            default="keep-best",
        ),
    ] = False
    svd: Annotated[
        str, Choices(c.SVDS), Help("Low-rank step: fast (within 0.1 % of exact) or the full SVD.", LOFTQ)
    ] = "fast"
    calibrate: Annotated[
        Text | None,
        PathText,
        NotEmpty,
        Help(
            "Weigh errors by the layers' inputs on this text (.txt, .jsonl, .json, .parquet, a directory of them, or a "
            "dataset on the Hub, or default for a mixed text that ships with loftq), or by second moments collected "
            "earlier (.safetensors).",
            LOFTQ,
            metavar="FILE|DATASET|default",
        ),
    ] = None
    calibration_tokens: Annotated[From1, Help("Number of tokens of the text to use.", LOFTQ, metavar="N")] = 16384
    calibrate_kind: Annotated[
        str,
        UnsetIsNone,
        Choices(c.CALIBRATE_KINDS),
        Help(
            "Weigh by the variance of each input, or by all covariances (slower, more disk space).",
            LOFTQ,
            default="diagonal; ldlq: full",
        ),
    ] = None  # type: ignore[assignment]  # `Recipe` sets it: it depends on the method
    calibration_hash: Annotated[
        Text | None,
        NotEmpty,
        Help("sha256 of the calibration data, written by loftq; data with another hash is refused."),
    ] = None
    seed: Annotated[From0, Help("Seed of every random start.", LOFTQ)] = 0
    max_shard_size: Annotated[
        str, ShardSize, Help("Largest weight file.", WHERE, metavar="SIZE", expects="give a size such as 5GB")
    ] = "5GB"
