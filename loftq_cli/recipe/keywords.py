"""The fields of a recipe as typed keywords: made by scripts/generate.py from recipe/fields.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict


class RecipeKeywords(TypedDict, total=False):
    """Keywords of `loftq_cli.quantize` and `loftq_cli.plan` beside their own arguments; None means not given."""

    revision: str | None
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    rule: str | Sequence[str] | None
    embeddings: str | None
    lm_head: str | None
    experts: str | None
    allow_nonfinite: bool | None
    meta_version: str | float | None
    bits: float | None
    mix: str | None
    target_size: str | int | None
    weigh: str | None
    data_type: str | None
    block_size: int | None
    group_size: int | None
    scale: str | None
    symmetric: bool | None
    double_quant: bool | None
    format: str | None
    dequantize: bool | None
    dtype: str | None
    method: str | None
    init: str | None
    rank: int | None
    rank_budget: float | None
    iters: int | None
    levels: str | None
    alpha: float | None
    keep_last: bool | None
    svd: str | None
    calibrate: str | Path | None
    calibration_tokens: int | None
    calibrate_kind: str | None
    calibration_hash: str | None
    seed: int | None
    max_shard_size: str | None
