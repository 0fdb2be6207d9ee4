"""Options of the method: how backbone and adapter are fitted."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Optional

from loftq_cli.cli.options.base import FIELD_HELPS, LOFTQ, recipe_option

_option = partial(recipe_option, panel=LOFTQ)

Method = Annotated[
    Optional[str],
    _option(
        "method",
        "loftq alternates as published; refined also fits scales, starts from the SVD and feeds errors back; qlora "
        "quantizes plainly and starts the adapter at zero; qa-lora pools the adapter's input over integer groups "
        "(--group-size), so that it merges into their zeros.",
    ),
]
Init = Annotated[
    Optional[str],
    _option(
        "init",
        "Start of refined (the rank-r SVD of the weights, or a zero adapter as LoftQ's) and of qa-lora (the low-rank "
        "part of the error, or zero over a plainly quantized backbone).",
        show="svd",
    ),
]
Rank = Annotated[Optional[int], _option("rank", "Rank of the adapter.")]
RankBudget = Annotated[
    Optional[float],
    _option("rank_budget", "Mean rank: more of it goes where the error's singular values are large.", metavar="MEAN"),
]
Iters = Annotated[Optional[int], _option("iters", "Alternating steps T; 0 is qlora.", show="5; refined: 16")]
Levels = Annotated[
    Optional[str],
    _option(
        "levels",
        "Levels of refined: NormalFloat, the best 4 or 8 of NF4's for 2 or 3 bits (fit bnb files), or fitted to each "
        "matrix (packed only).",
        show="those of --data-type",
    ),
]
Alpha = Annotated[
    Optional[float], _option("alpha", "lora_alpha; B is divided by alpha/rank, so the start is the same.", show="rank")
]
KeepLast = Annotated[
    Optional[bool],
    _option(
        "keep_last",
        "Keep the paper's literal last iterate, or the one with the smallest residual.",
        show="keep-best",
        flag="--keep-last/--keep-best",
    ),
]
Svd = Annotated[Optional[str], _option("svd", "Low-rank step: fast (within 0.1 % of exact) or the full SVD.")]
Calibrate = Annotated[
    Optional[str],
    _option(
        "calibrate",
        "Weigh errors by what the layers see on this text (.txt, .jsonl, .json, .parquet, a directory of them, or a "
        "dataset on the Hub), or by second moments collected before (.safetensors).",
        metavar="FILE|DATASET",
    ),
]
# No flag: it is written to loftq.yaml.
FIELD_HELPS["calibration_hash"] = "sha256 of what calibrate names, as loftq writes it; another file is then refused."
CalibrationTokens = Annotated[Optional[int], _option("calibration_tokens", "How much of the text to run.", metavar="N")]
CalibrateKind = Annotated[
    Optional[str],
    _option("calibrate_kind", "Weigh by each input's own variance, or by all covariances (slower, more disk)."),
]
Seed = Annotated[Optional[int], _option("seed", "Seed of every random start.")]
