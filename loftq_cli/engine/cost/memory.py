"""Predict the peak memory of a run from the plan's units alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loftq_cli.engine.compute.lanes import KEPT_BYTES, LANE_BYTES, Schedule
from loftq_cli.engine.compute.stacks import Stack, form_stacks
from loftq_cli.machine.usage import resident_memory
from loftq_cli.numerics.grids.trellis import PANEL, TrellisGrid
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.units import Unit

_WORKING_SET = 12  # bytes per weight: W and W - Q in float32, W - Q in bfloat16, codes of this and of the best step
_REFINED_SET = 10  # further bytes per weight for `refined`: target and feedback in float32, BA in bfloat16
# Bytes per weight of the rows that a trellis quantizes at a time: targets, gains, sequences, states.
_TRELLIS_SET = 64
_LDLQ_SET = 26  # for `ldlq`: target, errors, values, targets with feedback and E M in float32, two sets of codes
# Bytes per squared number of inputs for `ldlq`: the second moment and its roots, in float64 at first.
_MOMENT_SET = 32
_SPARE = 120 << 20  # allocator, thread stacks, buffers being written
# Bytes per weight on a device, where quantizing makes several passes over memory: measured 30 alone, 33 in a stack.
_DEVICE_SET = 33
_DEVICE_SPARE = 64 << 20  # cuBLAS and cuSOLVER
_DOWNLOADS = 2  # maximum number of stacks whose outputs are downloaded while the next is converted
_PAGE_LOCKED = 2  # maximum page-locked bytes per byte of a tensor: torch rounds up to powers of two


def peak_memory(plan: Plan, device: torch.device, schedule: Schedule) -> int:
    """Return the peak memory of a run with this schedule in bytes; on a GPU, that of the device."""
    method = plan.recipe.method
    if device.type != "cpu":
        return _device_memory(form_stacks(plan.units, plan.recipe, schedule.stack), schedule, method)
    needs = [working_set(unit, method) for unit in plan.units]
    together = schedule.lanes * max((need for need in needs if need <= LANE_BYTES), default=0)
    ahead = max((unit.source.nbytes for unit in plan.units), default=0) if schedule.read_ahead else 0
    return resident_memory() + max(together, max(needs, default=0)) + ahead + _SPARE


def _device_memory(stacks: Iterable[Stack], schedule: Schedule, method: str) -> int:
    """Add up the current stack, the sources of the next and the outputs of the last ones; copied tensors stay on the
    host."""
    units = [[unit for unit in stack.units if unit.matrix is not None] for stack in stacks]
    needs = max((sum(device_set(unit, method) for unit in stack) for stack in units), default=0)
    ahead = max((sum(unit.source.nbytes for unit in stack) for stack in units), default=0) if schedule.read_ahead else 0
    outputs = max((_output_bytes(stack) for stack in units), default=0)
    return needs + ahead + _DOWNLOADS * outputs + _DEVICE_SPARE


def resident_peak(plan: Plan, device: torch.device, schedule: Schedule) -> int:
    """Return the peak resident memory of this process; with a GPU, the memory that the transfers need."""
    if device.type == "cpu":
        return peak_memory(plan, device, schedule)
    stacks = form_stacks(plan.units, plan.recipe, schedule.stack)
    source = max((sum(unit.source.nbytes for unit in stack.units) for stack in stacks), default=0)
    outputs = max((_output_bytes(stack.units) for stack in stacks), default=0)
    uploads = (1 + _PAGE_LOCKED) * source * (1 + schedule.read_ahead)  # as read, and page-locked
    return resident_memory() + uploads + (1 + _DOWNLOADS) * _PAGE_LOCKED * outputs + _SPARE


def _output_bytes(units: Iterable[Unit]) -> int:
    return sum(unit.backbone_bytes + unit.adapter_bytes for unit in units)


def working_set(unit: Unit, method: str = "loftq") -> int:
    """Return the bytes that one unit needs at its peak: its source tensor and everything computed from it."""
    if unit.matrix is None:
        return 2 * unit.source.nbytes
    per_weight = _WORKING_SET + {"refined": _REFINED_SET, "ldlq": _LDLQ_SET}.get(method, 0)
    moments = _MOMENT_SET * unit.matrix.in_features**2 if method == "ldlq" else 0
    panel = _TRELLIS_SET * min(unit.matrix.weights, PANEL) if isinstance(unit.matrix.grid, TrellisGrid) else 0
    outputs = unit.backbone_bytes + 3 * unit.adapter_bytes
    return unit.source.nbytes + per_weight * unit.matrix.weights + moments + panel + outputs


def device_set(unit: Unit, method: str = "loftq") -> int:
    """Return `working_set` on a GPU."""
    assert unit.matrix is not None, "copied tensors stay on the host"
    return working_set(unit, method) + (_DEVICE_SET - _WORKING_SET) * unit.matrix.weights


def keeps_little(unit: Unit, method: str = "loftq") -> bool:
    """True if memory that a unit frees may be kept for the next one."""
    return working_set(unit, method) <= KEPT_BYTES


def fits_a_lane(unit: Unit, method: str = "loftq") -> bool:
    """True if a unit may share the machine with others of its size."""
    return working_set(unit, method) <= LANE_BYTES
