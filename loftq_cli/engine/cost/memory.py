"""Peak memory of carrying out a plan, from its units alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loftq_cli.engine.compute.lanes import KEPT_BYTES, LANE_BYTES, Pace
from loftq_cli.engine.compute.stacks import Batch, form_batches
from loftq_cli.machine.usage import resident_memory
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit

_WORKING_SET = 12  # bytes a weight: W and W - Q in float32, W - Q in bfloat16, codes of this and of the best step


_REFINED_SET = 10  # further bytes a weight for `refined`: target and feedback in float32, BA in bfloat16


_SPARE = 120 << 20  # allocator, thread stacks, buffers on their way to the disk


# Bytes a weight on a device, where quantizing goes through memory several times: measured 30 alone, 33 in a batch.
_DEVICE_SET = 33


_DEVICE_SPARE = 64 << 20  # what the libraries of products and decompositions take


_LEAVING = 2  # batches whose outputs are on their way to the host, at most, while the next is converted


_PAGE_LOCKED = 2  # times its size that a tensor takes in page-locked memory, at most: torch rounds to powers of two


def peak_memory(plan: Plan, device: torch.device, pace: Pace) -> int:
    """Peak memory of carrying out a plan at this pace, on a GPU the device's."""
    method = plan.recipe.method
    if device.type != "cpu":
        return _device_memory(form_batches(plan.units, plan.recipe, pace.batch), pace, method)
    needs = [working_set(unit, method) for unit in plan.units]
    together = pace.lanes * max((need for need in needs if need <= LANE_BYTES), default=0)
    ahead = max((unit.source.nbytes for unit in plan.units), default=0) if pace.read_ahead else 0
    return resident_memory() + max(together, max(needs, default=0)) + ahead + _SPARE


def _device_memory(batches: Iterable[Batch], pace: Pace, method: str) -> int:
    """Of the batch that is converted, the next one's sources and the last ones' outputs. What is copied stays away."""
    units = [[unit for unit in batch.units if unit.matrix is not None] for batch in batches]
    needs = max((sum(device_set(unit, method) for unit in batch) for batch in units), default=0)
    ahead = max((sum(unit.source.nbytes for unit in batch) for batch in units), default=0) if pace.read_ahead else 0
    outputs = max((_output_bytes(batch) for batch in units), default=0)
    return needs + ahead + _LEAVING * outputs + _DEVICE_SPARE


def resident_peak(plan: Plan, device: torch.device, pace: Pace) -> int:
    """Peak resident memory of this process; on a GPU what passes through on its way there and back."""
    if device.type == "cpu":
        return peak_memory(plan, device, pace)
    batches = form_batches(plan.units, plan.recipe, pace.batch)
    source = max((sum(unit.source.nbytes for unit in batch.units) for batch in batches), default=0)
    outputs = max((_output_bytes(batch.units) for batch in batches), default=0)
    staged = (1 + _PAGE_LOCKED) * source * (1 + pace.read_ahead)  # as it was read, and page-locked
    return resident_memory() + staged + (1 + _LEAVING) * _PAGE_LOCKED * outputs + _SPARE


def _output_bytes(units: Iterable[Unit]) -> int:
    return sum(unit.backbone_bytes + unit.adapter_bytes for unit in units)


def working_set(unit: Unit, method: str = "loftq") -> int:
    """Bytes one unit needs at its peak: its source tensor and everything computed from it."""
    if unit.matrix is None:
        return 2 * unit.source.nbytes
    per_weight = _WORKING_SET + (_REFINED_SET if method == "refined" else 0)
    return unit.source.nbytes + per_weight * unit.matrix.weights + unit.backbone_bytes + 3 * unit.adapter_bytes


def device_set(unit: Unit, method: str = "loftq") -> int:
    """`working_set` on a GPU."""
    assert unit.matrix is not None, "what is copied never gets there"
    return working_set(unit, method) + (_DEVICE_SET - _WORKING_SET) * unit.matrix.weights


def keeps_little(unit: Unit, method: str = "loftq") -> bool:
    """Whether what a unit frees may be kept for the next one."""
    return working_set(unit, method) <= KEPT_BYTES


def fits_a_lane(unit: Unit, method: str = "loftq") -> bool:
    """Whether a unit may share the machine with others of its size."""
    return working_set(unit, method) <= LANE_BYTES
