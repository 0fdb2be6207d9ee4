"""LDLQ: the metric, sweeps with error feedback, new scales for fixed codes, and the whole alternation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels import block_quantizer, column_quantizer
from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid, QuantizedBlocks, assign
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.grids.grid import Grid, dequantize
from loftq_cli.numerics.lowrank.truncate import frobenius
from loftq_cli.numerics.methods.ldlq import ldlq
from loftq_cli.numerics.methods.ldlq_metric import ABSORBED, DAMPING, Metric, metric
from loftq_cli.numerics.methods.ldlq_steps import refit, sweep_columns
from loftq_cli.numerics.methods.loftq import exact_step, fast_step
from loftq_cli.numerics.methods.refined import refined
from loftq_cli.numerics.methods.refined_steps import shallow_steps
from loftq_cli.numerics.methods.weighted import WeightedStep, weighted_loftq, weighted_result, whiten
from loftq_cli.numerics.quantizers.block_columns import BlockColumns
from loftq_cli.numerics.quantizers.columns import Columns
from loftq_cli.numerics.quantizers.integer_columns import IntegerColumns

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
GRIDS: list[Grid] = [
    BlockGrid(codebook("nf", 2), 64, "rows", BRAIN, BRAIN, signed=True),
    BlockGrid(codebook("nf", 3), 32, "flat", FULL, BRAIN),
    BlockGrid(codebook("nf", 4), 128, "rows", HALF, HALF, signed=True),
    BlockGrid(codebook("nf", 4), 64, "flat", FULL, BRAIN, nested=True),
    BlockGrid(codebook("uniform", 8), 64, "rows", FULL, FULL, signed=True),
    BlockGrid(codebook("fitted", 2), 64, "rows", BRAIN, BRAIN, signed=True),
    AffineGrid(2, 64, "float", BRAIN, BRAIN),
    AffineGrid(4, 32, "none", HALF, FULL),
    AffineGrid(3, 64, "integer", HALF, BRAIN, product_dtype=HALF, least_zero=1),
    AffineGrid(4, 0, "float", HALF, FULL, zero_dtype=HALF),
]
NAMES = [f"{grid.data_type}{grid.bits}-{grid.block_size}" for grid in GRIDS]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(width: int, seed: int = 1) -> Tensor:
    """Return the second moment of correlated inputs of very different sizes."""
    x = (normal(4 * width, width, seed=seed) * torch.logspace(0, -2, width)) @ normal(width, width, seed=seed + 1)
    return x.T @ x / len(x)


def weighted_error(found: Metric, error: Tensor) -> float:
    return frobenius(found.apply(error))


def plain_columns(grid: Grid) -> BlockColumns | IntegerColumns:
    return IntegerColumns(grid) if isinstance(grid, AffineGrid) else BlockColumns(grid)


def swept(weight: Tensor, grid: Grid, found: Metric, directions: Tensor | None = None, columns=None):
    columns, eased = columns or column_quantizer(grid, "cpu"), found.without(directions)
    sweep = columns.sweep(weight, eased.conditional_variances, None)
    return columns, sweep, eased, sweep_columns(weight, sweep, columns, eased)


def test_the_metric_is_the_damped_moment_as_a_triangular_product() -> None:
    s = moment(150).double()
    expected = s / s.diagonal().mean() + DAMPING * torch.eye(150)
    found = metric(s.float())
    assert torch.equal(found.root, found.root.triu()) and bool((found.root.diagonal() > 0).all())
    torch.testing.assert_close(found.root.double() @ found.root.double().T, expected, rtol=1e-5, atol=1e-6)
    e = normal(7, 150)
    torch.testing.assert_close(found.undo(found.apply(e)), e, rtol=1e-3, atol=1e-3)
    assert frobenius(found.apply(e)) == pytest.approx(frobenius(whiten(s.float()).apply(e)), rel=1e-5)
    assert torch.equal(metric(torch.zeros(5, 5)).root, torch.eye(5))


@pytest.mark.parametrize("tile", [1, 16])
def test_errors_that_the_correction_absorbs_are_almost_free(tile: int) -> None:
    found, v = metric(moment(150)), torch.linalg.qr(normal(150, 9)).Q
    eased = found.without(v)
    expected = (
        found.root.double() @ (torch.eye(150) - (1 - ABSORBED) * v.double() @ v.double().T) @ found.root.double().T
    )
    torch.testing.assert_close(eased.root.double() @ eased.root.double().T, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eased.square(slice(0, 150)).double(), expected, rtol=1e-4, atol=1e-5)
    # E M' = (E (I + feedback)) with the tiles' corners of M' left over
    everything = Columns(0, 150)
    shares = eased.feedback(everything, tile)
    tiles = torch.arange(150) // tile
    corners = torch.where(tiles.unsqueeze(1) == tiles, eased.root, 0.0)
    e = normal(5, 150)
    torch.testing.assert_close((e + e @ shares) @ corners, e @ eased.root, rtol=1e-3, atol=1e-3)
    variances = corners.square().sum(dim=1)
    torch.testing.assert_close(eased.variances(everything, tile), variances)


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_a_sweep_returns_what_loads_and_feedback_helps(grid: Grid) -> None:
    weight, found = normal(40, 160, seed=3), metric(moment(160))
    columns, sweep, eased, result = swept(weight, grid, found)
    assert torch.equal(dequantize(result.quantized, grid), result.values)
    identity = metric(torch.eye(160))
    _, _, _, without = swept(weight, grid, identity)
    with_feedback = weighted_error(found, weight - result.values)
    assert with_feedback < 0.8 * weighted_error(found, weight - without.values)
    again = refit(result, weight, columns, sweep.block, eased)
    assert torch.equal(dequantize(again.quantized, grid), again.values)
    assert weighted_error(found, weight - again.values) <= with_feedback


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_the_compiled_sweep_is_the_plain_one(grid: Grid) -> None:
    """Bit for bit, through sweeps, settled scales and refits, with short blocks at the end of rows."""
    weight, found, v = normal(70, 176, seed=4), metric(moment(176)), torch.linalg.qr(normal(176, 4)).Q
    outcomes = []
    for columns in (plain_columns(grid), column_quantizer(grid, "cpu")):
        columns, sweep, eased, result = swept(weight, grid, found, v, columns)
        target = result.target.clone()
        again = refit(result, weight, columns, sweep.block, eased)
        outcomes.append((target, again.values, again.quantized.codes))
    assert type(columns) is not type(plain_columns(grid)), "the compiled one is available here"
    for plain, compiled in zip(*outcomes):
        assert torch.equal(plain, compiled)


def test_uncorrelated_inputs_are_rounded_to_the_nearest_level() -> None:
    grid = BlockGrid(codebook("nf", 2), 64, "rows", FULL, FULL, signed=True)
    weight = normal(30, 192)
    _, _, _, result = swept(weight, grid, metric(torch.eye(192)))
    found = result.quantized
    assert isinstance(found, QuantizedBlocks)
    assert torch.equal(found.codes, assign(weight, found.absmax, grid, grid.levels()))
    quantizer = block_quantizer(grid, "cpu")
    fitted = quantizer.quantize_fitted(weight, weight)  # type: ignore[attr-defined]
    assert frobenius(weight - result.values) <= 1.0001 * frobenius(fitted.residual)


def run(weight: Tensor, grid: Grid, found: Metric, rounds: int = 4, rank: int = 8, **options):
    return ldlq(
        weight,
        block_quantizer(grid, "cpu"),
        column_quantizer(grid, "cpu"),
        found,
        rounds=rounds,
        low_rank=exact_step(rank) if rank else None,
        **options,
    )


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_the_best_round_is_kept_and_its_residuals_are_true(grid: Grid) -> None:
    weight, s = normal(48, 128, seed=5), moment(128)
    found, kept = metric(s), []
    for rounds in range(1, 5):
        outcome = run(weight, grid, found, rounds)
        result = outcome.result
        left = weight - dequantize(result.quantized, grid) - result.lora_b @ result.lora_a
        assert outcome.residual == pytest.approx(weighted_error(found, left) / weighted_error(found, weight), rel=1e-3)
        assert result.residual == pytest.approx(frobenius(left) / frobenius(weight), rel=1e-3)
        assert len(result.residuals) == rounds and 1 <= result.best <= rounds
        kept.append(outcome.residual)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < outcome.plain_residual


def test_the_correction_is_the_best_one_for_its_codes() -> None:
    grid, weight, s = GRIDS[0], normal(48, 128, seed=6), moment(128)
    result = run(weight, grid, metric(s)).result
    best = WeightedStep(whiten(s), exact_step(8))(weight - dequantize(result.quantized, grid), None)
    torch.testing.assert_close(result.lora_b @ result.lora_a, best.product(), rtol=1e-3, atol=1e-3)


def test_it_beats_the_calibrated_methods_without_feedback() -> None:
    grid, weight, s = GRIDS[0], normal(128, 192, seed=7), moment(192)
    quantizer, found = block_quantizer(grid, "cpu"), run(weight, grid, metric(s))
    loftq_residual = weighted_loftq(weight, quantizer, whiten(s), iters=5, low_rank=exact_step(8)).residual
    plain = refined(weight, quantizer, low_rank=shallow_steps(8, torch.Generator().manual_seed(0)))  # type: ignore[arg-type]
    refined_residual = weighted_result(weight, plain, grid, quantizer, whiten(s)).residual
    assert found.residual < 0.7 * min(loftq_residual, refined_residual)


def test_starts_and_options() -> None:
    grid, weight, found = GRIDS[5], normal(48, 128, seed=8), metric(moment(128))
    outcomes = [run(weight, grid, found, from_zero=zero) for zero in (False, True)]
    assert outcomes[0].residual != outcomes[1].residual
    levels = outcomes[0].result.quantized.levels  # type: ignore[union-attr]
    assert levels is not None and not torch.equal(levels, grid.levels())  # type: ignore[union-attr]
    bare = run(weight, grid, found, rank=0)
    assert bare.result.lora_a.shape == (0, 128) and bare.residual < bare.plain_residual
    assert run(weight, grid, found, 3, keep_last=True).result.best == 3
    zeros = run(torch.zeros(8, 128), grid, found)
    assert zeros.residual == 0.0 and not bool(zeros.result.lora_b.any())


def test_threads_do_not_change_a_bit() -> None:
    weight, s, outcomes = normal(520, 576, seed=9), moment(576), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            step = fast_step(8, torch.Generator().manual_seed(0))
            grid = GRIDS[0]
            columns, quantizer = column_quantizer(grid, "cpu"), block_quantizer(grid, "cpu")
            outcomes.append(ldlq(weight, quantizer, columns, metric(s), rounds=2, low_rank=step).result)
    finally:
        torch.set_num_threads(threads)
    one, two = outcomes
    assert torch.equal(one.quantized.codes, two.quantized.codes)
    assert torch.equal(one.lora_a, two.lora_a) and torch.equal(one.lora_b, two.lora_b)


@dataclass
class Tiles:
    """A sweep whose codes span 16 columns: rounding to multiples of a step per tile."""

    codes: Tensor
    step: float
    block: int = 64
    tile: int = 16

    def begin_block(self, columns: Columns, target: Tensor, weight: Tensor) -> None:
        assert target.shape[1] == columns.width == weight.shape[0] and bool((weight > 0).all())

    def quantize(self, columns: Columns, target: Tensor) -> Tensor:
        assert columns.width == 16 and columns.start % 16 == 0
        self.codes[:, columns.slice] = (target / self.step).round()
        return self.codes[:, columns.slice] * self.step

    def quantized(self):
        return QuantizedBlocks(self.codes, torch.empty(0))


@dataclass(frozen=True)
class TileQuantizer:
    """A `ColumnQuantizer` without parameters, as far as a sweep needs it."""

    def parameters(self, quantized, columns):
        return ()


def test_codes_may_span_several_columns() -> None:
    weight, found = normal(32, 192, seed=10), metric(moment(192))
    sweep = Tiles(torch.empty(32, 192), 0.8)
    result = sweep_columns(weight, sweep, TileQuantizer(), found.without(None))  # type: ignore[arg-type]
    plain = (weight / 0.8).round() * 0.8
    assert weighted_error(found, weight - result.values) < 0.8 * weighted_error(found, weight - plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_moment_that_no_layer_has_is_refused(value: float) -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        metric(torch.eye(8) * value)
