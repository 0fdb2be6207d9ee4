"""Convert one unit: take a tensor, return its output tensors and its record. Does not touch files."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import MatrixRecord
from loftq_cli.artifacts.summary import matrix_record
from loftq_cli.engine.compute.finite import first_nonfinite
from loftq_cli.engine.compute.fit import fit_ldlq, fit_refined
from loftq_cli.errors import LoftqError
from loftq_cli.formats import get_format
from loftq_cli.formats.adapter import encode_adapter
from loftq_cli.kernels import block_quantizer
from loftq_cli.machine.memory import Float32Buffer
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.grid import Grid
from loftq_cli.numerics.lowrank.truncate import SAFE_NORM
from loftq_cli.numerics.methods.loftq import LoftQResult, LowRankStep, exact_step, fast_step, loftq, plain_start
from loftq_cli.numerics.methods.qalora import PooledStep
from loftq_cli.numerics.methods.stacked import stacked_loftq
from loftq_cli.numerics.methods.weighted import (
    WeightedResult,
    weighted_loftq,
    whiten,
)
from loftq_cli.numerics.methods.zero_start import zero_start
from loftq_cli.planning.units import Unit
from loftq_cli.recipe.model import Recipe
from loftq_cli.tensorfile.dtypes import to_dtype


@dataclass(frozen=True)
class Converted:
    """Output tensors by name, split by file kind; `record` is None for a copied tensor.

    Tensors stay on the device that computed them: `engine.compute.transfers` copies them to the CPU.
    """

    backbone: dict[str, Tensor]
    adapter: dict[str, Tensor]
    record: MatrixRecord | None


def convert(
    unit: Unit,
    tensor: Tensor,
    recipe: Recipe,
    device: torch.device,
    moment: Tensor | None = None,
    buffer: Float32Buffer | None = None,
) -> Converted:
    """Quantize or copy one tensor.

    Args:
        tensor: as stored on disk, on the CPU or already on the device.
        moment: second moment of the layer's inputs, [in] or [in, in], by which errors are weighted.
        buffer: memory to reuse for W.

    Raises:
        LoftqError: a matrix to quantize holds NaN, infinity, or numbers close to what float32 can hold.
    """
    generator = torch.Generator().manual_seed(_seed(recipe.seed, unit.tensor))
    if unit.matrix is None:
        return _copy(unit, tensor, recipe, generator)
    started = time.perf_counter()
    quantize = partial(_quantize, unit, tensor, recipe, device, generator, moment, buffer)
    result, weighted = _finite_result(unit, tensor, quantize)
    return _converted(unit, result, weighted, recipe, started)


def convert_together(
    units: Sequence[Unit], tensors: Sequence[Tensor], recipe: Recipe, device: torch.device
) -> list[Converted]:
    """Convert all units of an `engine.compute.stacks.Stack`, together as far as possible.

    Raises:
        LoftqError: as `convert`.
    """
    started = time.perf_counter()
    results = _quantize_together(units, tensors, recipe, device)
    share = (time.perf_counter() - started) / len(units)
    converted = []
    for unit, tensor, result in zip(units, tensors, results):
        if result is None:
            converted.append(convert(unit, tensor, recipe, device))
        else:
            converted.append(_converted(unit, result, None, recipe, time.perf_counter() - share))
    return converted


def _quantize_together(
    units: Sequence[Unit], tensors: Sequence[Tensor], recipe: Recipe, device: torch.device
) -> list[LoftQResult | None]:
    """Call `numerics.methods.stacked.stacked_loftq`."""
    matrix, target = units[0].matrix, units[0].target
    assert matrix is not None and target is not None, "stacks hold only matrices with adapters"
    return stacked_loftq(
        torch.stack([_weight(unit, tensor, device) for unit, tensor in zip(units, tensors)]),
        block_quantizer(matrix.grid, device),
        rank=target.rank,
        iters=recipe.iters,
        seeds=[_seed(recipe.seed, unit.tensor) for unit in units],
        keep_last=recipe.keep_last,
    )


def _converted(
    unit: Unit, result: LoftQResult, weighted: WeightedResult | None, recipe: Recipe, started: float
) -> Converted:
    """Return the encoded outputs of a matrix and its record.

    Args:
        started: `time.perf_counter()` when work on it began.
    """
    assert unit.matrix is not None
    backbone, adapter = get_format(recipe.format).encode(unit.matrix, result.quantized), {}
    if unit.target is not None:
        adapter = encode_adapter(unit.target, result.lora_a, result.lora_b, recipe.scaling)
        # All copies have the same alpha, the recipe's rank, which readers divide by each adapter's own rank.
        share = unit.target.rank / recipe.rank
        adapter |= get_format(recipe.format).encode_copies(unit.matrix, result.lora_a, result.lora_b * share)
    device = result.quantized.codes.device
    if device.type == "cuda":  # otherwise the time would be read before the work is done
        torch.cuda.current_stream(device).synchronize()
    record = matrix_record(
        unit,
        plain_residual=_rounded(result.plain_residual),
        residual=_rounded(result.residual),
        residuals=tuple(_rounded(value) for value in result.residuals),
        best=result.best,
        seconds=round(time.perf_counter() - started, 3),
        weighted_plain_residual=None if weighted is None else _rounded(weighted.plain_residual),
        weighted_residual=None if weighted is None else _rounded(weighted.residual),
    )
    return Converted(backbone, adapter, record)


def _finite_result(
    unit: Unit, tensor: Tensor, quantize: Callable[[], tuple[LoftQResult, WeightedResult | None]]
) -> tuple[LoftQResult, WeightedResult | None]:
    """Call `quantize` and check that its residuals are finite.

    Raises:
        LoftqError: float32 overflowed, because the weights are too large or the iteration diverged.
    """
    cause: Exception | None = None
    try:
        result, weighted = quantize()
        weighed = () if weighted is None else (weighted.plain_residual, weighted.residual)
        if all(map(math.isfinite, (result.plain_residual, *result.residuals, *weighed))):
            return result, weighted
    except torch.linalg.LinAlgError as error:
        cause = error
    highest = float(tensor.abs().max())
    if 1 / SAFE_NORM < highest < SAFE_NORM:
        raise LoftqError(
            f"the iteration on {unit.tensor} in {unit.source.file} left float32's range, or a decomposition failed: "
            f"use fewer --iters, or leave the matrix out with --exclude '{unit.module}'."
        ) from cause
    raise LoftqError(
        f"{unit.tensor} in {unit.source.file} holds numbers up to {highest:.3g}, outside of float32's working range: "
        f"leave the matrix out with --exclude '{unit.module}'."
    ) from cause


def _quantize(
    unit: Unit,
    tensor: Tensor,
    recipe: Recipe,
    device: torch.device,
    generator: torch.Generator,
    moment: Tensor | None,
    buffer: Float32Buffer | None,
) -> tuple[LoftQResult, WeightedResult | None]:
    """Run LoftQ on one matrix; the float32 weight is freed when this returns."""
    assert unit.matrix is not None
    weight = _weight(unit, tensor, device, buffer)
    _check_finite(unit, unit.matrix.orientation.turn(weight))
    _check_range(unit, weight)
    weight = weight.contiguous()
    quantizer = block_quantizer(unit.matrix.grid, weight.device)
    rank = unit.target.rank if unit.target else 0
    if recipe.plain or (rank == 0 and not recipe.fits_scales):
        return plain_start(weight, quantizer, rank=rank, generator=generator, group=recipe.pooling), None
    if recipe.method == "ldlq" and (moment is not None or _is_nested(unit.matrix.grid)):
        found = fit_ldlq(weight, quantizer, rank, unit.matrix.grid, recipe, generator, moment)
        return found.result, None if moment is None else found
    whitening = None if moment is None else whiten(moment.to(device))
    if recipe.fits_scales:
        return fit_refined(weight, quantizer, rank, unit.matrix.grid, recipe, generator, whitening)
    step: LowRankStep = exact_step(rank) if recipe.svd == "exact" else fast_step(rank, generator)
    if recipe.pooling > 1:
        step = PooledStep(rank, recipe.pooling, generator)
    if whitening is None:
        return loftq(weight, quantizer, iters=recipe.iters, low_rank=step, keep_last=recipe.keep_last), None
    weighted = weighted_loftq(
        weight,
        quantizer,
        whitening,
        iters=recipe.iters,
        low_rank=step,
        keep_last=recipe.keep_last,
    )
    return weighted.result, weighted


def _weight(unit: Unit, tensor: Tensor, device: torch.device, buffer: Float32Buffer | None = None) -> Tensor:
    """Return the weight in float32 [out, in] on the device, not always contiguous."""
    assert unit.matrix is not None
    there = tensor.to(device)
    weight = there.float() if buffer is None or device.type != "cpu" else buffer.float32(there)
    return unit.matrix.orientation.turn(weight)


def _is_nested(grid: Grid) -> bool:
    return isinstance(grid, BlockGrid) and grid.nested


def _copy(unit: Unit, tensor: Tensor, recipe: Recipe, generator: torch.Generator) -> Converted:
    (output,) = unit.backbone
    adapter = {}
    if unit.target is not None:
        target = unit.target
        start = zero_start(
            target.out_features, target.in_features, target.rank, generator=generator, group=target.group
        )
        adapter = encode_adapter(target, start.lora_a, start.lora_b, recipe.scaling)
    return Converted({output.name: to_dtype(tensor, output.dtype, unit.tensor)}, adapter, None)


def _seed(seed: int, name: str) -> int:
    """Return a seed for one matrix that does not depend on the order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")


def _check_finite(unit: Unit, tensor: Tensor) -> None:
    bad = first_nonfinite(tensor)
    if bad is not None:
        raise LoftqError(
            f"{unit.tensor} in {unit.source.file} holds {bad}: the checkpoint is damaged there; repair it, or keep "
            "such matrices in full precision with --allow-nonfinite."
        )


def _check_range(unit: Unit, weight: Tensor) -> None:
    """Check that the grid's dtypes can represent the weights; only float16 is too narrow for what float32 can hold."""
    assert unit.matrix is not None
    grid = unit.matrix.grid
    dtypes = {grid.value_dtype, grid.product_dtype if isinstance(grid, AffineGrid) else grid.scale_dtype}
    if torch.float16 in dtypes:
        highest = float(weight.abs().max()) if weight.numel() else 0.0
        if highest > torch.finfo(torch.float16).max:
            raise LoftqError(
                f"{unit.tensor} in {unit.source.file} holds numbers up to {highest:.4g}, which float16 cannot "
                f"represent: choose another --dtype or --format, or leave it out with --exclude '{unit.module}'."
            )


def _rounded(value: float) -> float:
    """Round to eight significant digits, the precision of float32 arithmetic and a bounded length in the manifest."""
    return float(f"{value:.8g}")
