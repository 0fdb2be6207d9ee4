"""The fields of a recipe, each declared once.

Its flag, YAML key, JSON schema, Python keyword and line in the documentation are made from the declaration. After a
change run `python scripts/generate.py`, which rewrites the files that are generated from this one.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

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


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class RecipeFields:
    """Everything the user can ask for, in the order of the help page and of loftq.yaml."""

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
        tuple[Text, ...], TextList, Help("Only modules matching this glob (repeatable).", WHAT, metavar="GLOB")
    ] = ()
    exclude: Annotated[
        tuple[Text, ...], TextList, Help("Leave modules matching this glob alone (repeatable).", WHAT, metavar="GLOB")
    ] = ()
    rule: Annotated[
        tuple[Text, ...],
        TextList,
        Rules,
        Help(
            "What modules matching a regex get: bits, bits:rank, skip (left alone) or dense (full precision with an "
            "adapter that starts at zero). Repeatable, the first match wins.",
            WHAT,
            metavar="REGEX=SPEC",
        ),
    ] = ()
    embeddings: Annotated[
        str,
        Choices(c.EMBEDDINGS),
        Help("Input embedding: keep it, quantize it, or quantize it and give it an adapter (adapt).", WHAT),
    ] = "keep"
    lm_head: Annotated[str, Choices(c.LM_HEADS), Help("Output head: keep it or quantize it.", WHAT)] = "keep"
    experts: Annotated[
        str,
        Choices(c.EXPERTS),
        Help(
            "Experts of a mixture: quantize them where the container can hold them, require that it can, or keep them.",
            WHAT,
        ),
    ] = "quantize"
    allow_nonfinite: Annotated[
        bool,
        Help(
            "Leave a matrix that holds NaN or infinity in full precision instead of stopping; every matrix is read "
            "once more beforehand.",
            WHAT,
            flag="--allow-nonfinite",
            default="",
        ),
    ] = False
    meta_version: Annotated[
        str,
        AsText,
        Choices(c.META_VERSIONS),
        Help("Which Llama Meta's consolidated.*.pth are, where params.json leaves it open.", WHAT),
    ] = "auto"
    bits: Annotated[
        int | float,
        Ge(c.BITS[0]),
        Le(c.BITS[-1]),
        Help(
            "Bits of a weight's code, or a mean such as 2.5.",
            GRID,
            choices=c.BITS,
            expects=f"choose one of {_WIDTHS}, or a mean between them with --mix",
        ),
    ] = 4
    mix: Annotated[
        str,
        KnownMix,
        Help(
            "Widths matrix by matrix: the least error under the budget (optimal), or 4 bits in the first layers and 2 "
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
        Help("Size of the backbone as the budget of --mix.", GRID, metavar="SIZE", expects="give a size such as 6GB"),
    ] = None
    weigh: Annotated[
        str,
        Choices(c.WEIGHINGS),
        Help("What optimal minimises: squared error relative to each matrix, or as it is.", GRID),
    ] = "relative"
    data_type: Annotated[
        str,
        Choices(c.DATA_TYPE_CHOICES),
        Help(
            "Levels: NormalFloat, its symmetric variant, evenly spaced (8 bits are always uniform), or integers with "
            "fitted scales; auto is int for the containers of integers, else nf.",
            GRID,
        ),
    ] = "auto"
    block_size: Annotated[int, Choices(c.BLOCK_SIZES), Help("Weights that share a scale.", GRID)] = 64
    group_size: Annotated[
        int | None,
        KnownGroup,
        Help(
            "The same for integers; -1 is a whole row.",
            GRID,
            choices=c.GROUP_SIZES,
            default="64, gguf 32",
            expects=f"choose one of {_GROUPS} (-1 is a whole row)",
        ),
    ] = None
    scale: Annotated[
        str,
        Choices(c.SCALES),
        Help(
            "Scales by the largest magnitude, by the range, or of least squared error; auto is mse for integers, "
            "absmax for codebooks.",
            GRID,
        ),
    ] = "auto"
    symmetric: Annotated[
        bool | None,
        Help(
            "Integers without or with a zero of each group.",
            GRID,
            flag="--symmetric/--asymmetric",
            default="symmetric in compressed-tensors and gguf",
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
            "Let transformers unpack a compressed-tensors model while loading (needed to train), or keep it packed.",
            GRID,
            flag="--dequantize/--compressed",
            default="dequantize",
        ),
    ] = True
    dtype: Annotated[
        str, Choices(c.DTYPE_CHOICES), Help("Type the model is loaded in; auto keeps the source's.", GRID)
    ] = "auto"
    method: Annotated[
        str,
        Choices(c.METHODS),
        Help(
            "loftq alternates as published; refined also fits scales, starts from the SVD and feeds errors back; qlora "
            "quantizes plainly and starts the adapter at zero; qa-lora pools the adapter's input over integer groups "
            "(--group-size), so that it merges into their zeros.",
            LOFTQ,
        ),
    ] = "loftq"
    init: Annotated[
        str | None,
        Choices(c.INITS),
        Help(
            "Start of refined (the rank-r SVD of the weights, or a zero adapter as LoftQ's) and of qa-lora (the "
            "low-rank part of the error, or zero over a plainly quantized backbone).",
            LOFTQ,
            default="svd",
        ),
    ] = None
    rank: Annotated[From1, Help("Rank of the adapter.", LOFTQ)] = 16
    rank_budget: Annotated[
        Mean,
        Help(
            "Mean rank: more of it goes where the error's singular values are large.",
            LOFTQ,
            metavar="MEAN",
            expects="give a mean rank from 1 on",
        ),
    ] = None
    iters: Annotated[From0, UnsetIsNone, Help("Alternating steps T; 0 is qlora.", LOFTQ, default="5; refined: 16")] = (
        None  # type: ignore[assignment]  # `Recipe` sets it: it depends on the method
    )
    levels: Annotated[
        str | None,
        Choices(c.LEVELS),
        Help(
            "Levels of refined: NormalFloat, the best 4 or 8 of NF4's for 2 or 3 bits (fit bnb files), or fitted to "
            "each matrix (packed only).",
            LOFTQ,
            default="those of --data-type",
        ),
    ] = None
    alpha: Annotated[
        int | float | None,
        Gt(0),
        Lt(1e30),
        Help(
            "lora_alpha; B is divided by alpha/rank, so the start is the same.",
            LOFTQ,
            default="rank",
            expects="give a positive number, or leave it out for alpha = rank",
        ),
    ] = None
    keep_last: Annotated[
        bool,
        Help(
            "Keep the paper's literal last iterate, or the one with the smallest residual.",
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
            "Weigh errors by what the layers see on this text (.txt, .jsonl, .json, .parquet, a directory of them, or "
            "a dataset on the Hub), or by second moments collected before (.safetensors).",
            LOFTQ,
            metavar="FILE|DATASET",
        ),
    ] = None
    calibration_tokens: Annotated[From1, Help("How much of the text to run.", LOFTQ, metavar="N")] = 16384
    calibrate_kind: Annotated[
        str,
        Choices(c.CALIBRATE_KINDS),
        Help("Weigh by each input's own variance, or by all covariances (slower, more disk).", LOFTQ),
    ] = "diagonal"
    calibration_hash: Annotated[
        Text | None,
        NotEmpty,
        Help("sha256 of what calibrate names, as loftq writes it; another file is then refused."),
    ] = None
    seed: Annotated[From0, Help("Seed of every random start.", LOFTQ)] = 0
    max_shard_size: Annotated[
        str, ShardSize, Help("Largest weight file.", WHERE, metavar="SIZE", expects="give a size such as 5GB")
    ] = "5GB"
