"""Refusals that several containers share."""

from __future__ import annotations

import re

from loftq_cli.formats.base import GridRequest, Refusal

INSTEAD = "use --format packed or --format dense"


def plain_scales(request: GridRequest) -> Refusal | None:
    """Refuse quantized scales."""
    if request.double_quant:
        return Refusal("only bitsandbytes quantizes its scales: use --format bnb", fatal=True)
    return None


def integers_only(request: GridRequest) -> Refusal | None:
    """Refuse codebooks and quantized scales."""
    if refusal := plain_scales(request):
        return refusal
    if request.data_type != "int":
        return Refusal(f"it holds integers only, not '{request.data_type}' levels: {INSTEAD}", fatal=True)
    return None


def whole_groups(request: GridRequest) -> Refusal | None:
    """Refuse rows that are not a whole number of groups."""
    if not request.group_divides:
        reason = f"groups of {request.block_size} do not divide rows of {request.in_features}"
        ways = f"choose another --group-size, leave it out with {exclude(request.module)}, or {INSTEAD}"
        return Refusal(f"{reason}: {ways}", fatal=True)
    return None


def exclude(module: str) -> str:
    """Return the option that leaves out a module in every layer."""
    return f"--exclude '{re.sub(r'^.*[.][0-9]+[.]', '*.', module)}'"
