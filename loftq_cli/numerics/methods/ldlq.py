"""LDLQ in the loop: rounding with error propagation, alternated with the best low-rank correction of the outputs.

The objective is the layer's output on a text, E‖(W - Q - BA) x‖² = tr(E H Eᵀ) with H = E[x xᵀ]. Each round has four
steps (`numerics.methods.ldlq_steps`):

1. BA is the best for the last Q, SVD_r((W - Q) M) M⁻¹ with M Mᵀ = H.
2. W - BA is quantized from the first column to the last on the container's own grid, with scales fitted when a block
   begins. Every column is rounded to make up for the errors of earlier ones. Errors in the directions of BA are almost
   free.
3. Scales are fitted again, for these codes and all of H.
4. BA is computed again, and the round is kept if it has the least tr(E H Eᵀ).

Neither rounding nor the freed directions lower the objective in every round, so the best round is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loftq_cli.numerics.grids.grid import Quantized
from loftq_cli.numerics.lowrank.truncate import LowRank, frobenius
from loftq_cli.numerics.methods.ldlq_metric import Metric
from loftq_cli.numerics.methods.ldlq_steps import Swept, refit, sweep_columns
from loftq_cli.numerics.methods.loftq import LoftQResult, LowRankStep
from loftq_cli.numerics.methods.weighted import WeightedResult, product_of
from loftq_cli.numerics.quantizers.columns import ColumnQuantizer
from loftq_cli.numerics.quantizers.protocols import Quantizer

DEFAULT_ROUNDS = 4


@dataclass(frozen=True)
class _Kept:
    """The best round so far: its number from 1, its codes and its correction."""

    number: int
    error: float
    quantized: Quantized
    white: LowRank | None


def ldlq(
    weight: Tensor,
    quantizer: Quantizer,
    columns: ColumnQuantizer,
    metric: Metric,
    *,
    rounds: int = DEFAULT_ROUNDS,
    low_rank: LowRankStep | None,
    from_zero: bool = False,
    keep_last: bool = False,
) -> WeightedResult:
    """Quantize one matrix; see the module's docstring.

    Args:
        weight: float32 [out, in].
        quantizer: gives the residuals of plain quantization.
        low_rank: finds SVD_r of a matrix; None for a matrix without an adapter.
        from_zero: the first round quantizes W itself instead of W minus its own best BA.
        keep_last: keep the last round instead of the best one.
    """
    assert rounds >= 1, "without a round there is only plain quantization: use plain_start"
    image = metric.apply(weight)
    norm, weighted_norm = frobenius(weight), frobenius(image)
    white = None if low_rank is None or from_zero else low_rank(image, None)
    del image
    plain = quantizer.quantize_residual(weight, weight).residual
    found = _correction(white, metric)
    swept: Swept | None = None
    kept: _Kept | None = None
    residuals: list[float] = []
    for number in range(1, rounds + 1):
        target = weight if found is None else weight - found.product()
        eased = metric.without(None if white is None else white.v)
        if swept is not None:
            columns = columns.learn(swept.target, swept.quantized, eased.conditional_variances)
        before = None if swept is None else swept.quantized
        sweep = columns.sweep(target, eased.conditional_variances, before)
        swept = refit(sweep_columns(target, sweep, columns, eased), target, columns, sweep.block, eased)
        error = metric.apply(weight - swept.values)
        white = None if low_rank is None else low_rank(error, white)
        found = _correction(white, metric)
        residuals.append(_relative(weight - swept.values, found, norm))
        left = frobenius(error if white is None else error - white.product())
        if kept is None or keep_last or left < kept.error:
            kept = _Kept(number, left, swept.quantized, white)
    assert kept is not None
    found = _correction(kept.white, metric)
    a, b = _factors(found, weight)
    result = LoftQResult(kept.quantized, a, b, _share(frobenius(plain), norm), tuple(residuals), kept.number)
    return WeightedResult(
        result, _share(frobenius(metric.apply(plain)), weighted_norm), _share(kept.error, weighted_norm)
    )


def _correction(white: LowRank | None, metric: Metric) -> LowRank | None:
    """Return BA for the SVD of BA M."""
    return None if white is None else product_of(white.u, metric.undo((white.v * white.s).T))


def _relative(residual: Tensor, found: LowRank | None, norm: float) -> float:
    return _share(frobenius(residual if found is None else residual - found.product()), norm)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _factors(found: LowRank | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    if found is None:
        return weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    return found.lora_a, found.lora_b
