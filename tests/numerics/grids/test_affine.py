"""Integer groups: the loader's arithmetic, the rules for scales, and the guarantees of `mse`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids import affine
from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, Zero, dequantize
from loftq_cli.numerics.lowrank.truncate import exact_low_rank
from loftq_cli.numerics.methods.loftq import exact_step, loftq
from loftq_cli.numerics.quantizers.integer import AffineQuantizer
from loftq_cli.numerics.quantizers.protocols import QuantizeStep, Scratch

BITS = (2, 3, 4, 8)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# The grids of the containers: symmetric, GPTQ's, GGUF's Q4_1 and packed's.
KINDS: dict[str, tuple[Zero, dict]] = {
    "symmetric": ("none", {}),
    "zero point": ("integer", {"product_dtype": F16, "least_zero": 1}),
    "float16 offset": ("float", {"zero_dtype": F16}),
    "float32 offset": ("float", {}),
}


def grid(bits: int, kind: str, group_size: int = 64, dtype: torch.dtype = BF16, **changes) -> AffineGrid:
    zero, more = KINDS[kind]
    scale_dtype = F16 if "16" in kind or kind == "zero point" else dtype
    return AffineGrid(bits, group_size, zero, scale_dtype, dtype, **{**more, **changes})


def weights(rows: int = 24, columns: int = 256) -> Tensor:
    """Rows of several kinds: Gaussian, heavy-tailed, of one sign, constant, zero, tiny."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * 0.02
    x[1] = x[1] ** 3 * 1e4
    x[2], x[3], x[4], x[5] = x[2].abs(), -x[3].abs() - 0.1, 0.0, 0.037
    x[6] *= 1e-5
    x[7, 5] = 3.0
    return x


def quantize(x: Tensor, on: AffineGrid) -> QuantizedGroups:
    """Quantize with the fastest quantizer; a test below compares the compiled one with its twin."""
    found = block_quantizer(on, "cpu").quantize_residual(x, x).quantized
    assert isinstance(found, QuantizedGroups)
    return found


def group_errors(x: Tensor, q: QuantizedGroups, on: AffineGrid) -> Tensor:
    squares = (x.double() - dequantize(q, on).double()).square()
    width = on.width(x.shape[1])
    padded = torch.nn.functional.pad(squares, (0, -x.shape[1] % width))
    return padded.unflatten(1, (-1, width)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_written_formula(bits: int, kind: str) -> None:
    for dtype, group_size, columns in itertools.product((BF16, F16, F32), (32, 0), (96, 80)):
        on = grid(bits, kind, group_size, dtype, scale_rule="minmax")
        found = quantize(weights(columns=columns), on)
        got = dequantize(found, on)
        for row, column in ((0, 0), (3, 40), (7, columns - 1)):
            group = column // on.width(columns)
            code, scale = float(found.codes[row, column]), found.scales[row, group]
            zero = 0.0 if found.zeros is None else found.zeros[row, group]
            if on.zero == "float":
                value = scale * code + zero
            elif on.zero == "integer":
                value = (scale * (code - zero)).to(on.product_dtype)
            else:
                value = scale * (code - 2 ** (bits - 1))
            assert float(value.to(dtype)) == float(got[row, column])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_fits_the_container(bits: int, kind: str) -> None:
    for rule in ("absmax", "minmax", "mse"):
        on = grid(bits, kind, scale_rule=rule)
        found = quantize(weights(columns=100), on)
        assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**bits
        assert found.scales.shape == (24, 2) and torch.equal(found.scales, found.scales.to(on.scale_dtype).float())
        if on.zero == "none":
            assert found.zeros is None
            continue
        zeros = found.zeros
        assert zeros is not None and zeros.shape == (24, 2)
        if on.zero == "integer":
            assert torch.equal(zeros, zeros.round()) and zeros.min() >= on.least_zero and zeros.max() <= on.top
        else:
            assert torch.equal(zeros, zeros.to(on.zero_dtype).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [256, 100])
def test_mse_is_never_worse_than_minmax_on_any_group(bits: int, kind: str, columns: int) -> None:
    x = weights(columns=columns)
    for group_size, dtype in ((64, BF16), (32, F16), (0, F32)):
        on = grid(bits, kind, group_size, dtype)
        minmax = replace(on, scale_rule="minmax")
        fitted, plain = group_errors(x, quantize(x, on), on), group_errors(x, quantize(x, minmax), minmax)
        assert bool((fitted <= plain * (1 + 1e-5)).all())
        assert fitted.sum() < plain.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_mse_at_two_bits_is_near_the_best_scale(kind: str) -> None:
    """Compared with a dense scan of scale and zero for each group."""
    x = weights()[:1, :128]
    on = grid(2, kind, dtype=F32)
    found = group_errors(x, quantize(x, on), on)
    best = torch.full_like(found, float("inf"))
    steps = torch.linspace(0.2, 2.0, 181) * float(x.std())
    zeros = {"none": [2.0], "integer": [1.0, 2.0, 3.0]}.get(on.zero, [])
    offsets = torch.linspace(-3, 0, 121) * float(x.std()) if on.zero == "float" else torch.zeros(1)
    for step, point, offset, sign in itertools.product(steps, zeros or [0.0], offsets, (1, -1)):
        if sign < 0 and on.zero != "none":
            continue
        scale = sign * float(step)
        codes = ((x - offset) / scale + point).round().clamp(0, 3)
        values = (codes - point) * scale + offset
        best = torch.minimum(best, (x - values).double().square().unflatten(1, (-1, 64)).sum(-1))
    assert bool((found <= best * 1.03).all()), (found / best).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_fitted_step_is_never_worse_than_its_starting_scales(bits: int, kind: str) -> None:
    x = weights()
    on = grid(bits, kind, scale_rule="minmax")
    quantizer = block_quantizer(on, "cpu")
    assert hasattr(quantizer, "quantize_fitted")
    first = quantizer.quantize_residual(x, x)
    target = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 0.003
    refined = quantizer.quantize_fitted(x, target, previous=first)
    searched = quantizer.quantize_fitted(x, target)
    assert isinstance(first.quantized, QuantizedGroups) and isinstance(refined.quantized, QuantizedGroups)
    assert torch.equal(refined.residual, x - dequantize(refined.quantized, on))
    scales = first.quantized.scales.repeat_interleave(64, 1)
    zeros = torch.zeros(()) if first.quantized.zeros is None else first.quantized.zeros.repeat_interleave(64, 1)
    inverse = torch.where(scales == 0, 0.0, scales.reciprocal())
    if on.zero == "float":
        codes = (target - zeros) * inverse
    else:
        codes = target * inverse + (zeros if on.zero == "integer" else 2 ** (bits - 1))
    again = QuantizedGroups(codes.round().clamp(0, on.top).byte(), first.quantized.scales, first.quantized.zeros)
    start = group_errors(target, again, on)
    assert bool((group_errors(target, refined.quantized, on) <= start * (1 + 1e-5)).all())
    assert group_errors(target, searched.quantized, on).sum() < start.sum()


def same(first: QuantizeStep, second: QuantizeStep) -> bool:
    one, two = first.quantized, second.quantized
    assert isinstance(one, QuantizedGroups) and isinstance(two, QuantizedGroups)
    zeros = one.zeros is two.zeros is None or torch.equal(one.zeros, two.zeros)
    codes = torch.equal(one.codes, two.codes) and torch.equal(first.residual, second.residual)
    return zeros and codes and torch.equal(one.scales, two.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_compiled_quantizer_has_the_bits_of_its_twin(bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that are not a multiple of the lanes, short last groups, whole rows; in panels of a few rows."""
    compiled = pytest.importorskip("loftq_cli.kernels.cpu.integer_quantizer").CompiledAffineQuantizer
    monkeypatch.setattr(affine, "_PANEL_CPU", 2048)
    for (columns, group_size, dtype), rule in zip(
        ((100, 64, BF16), (96, 32, F16), (70, 0, F32)), ("mse", "minmax", "absmax")
    ):
        on = grid(bits, kind, group_size, dtype, scale_rule=rule)
        x = weights(columns=columns)
        plain, fast = AffineQuantizer(on).quantize_residual(x, x), compiled(on).quantize_residual(x, x)
        assert same(plain, fast)
        assert fast.norm == pytest.approx(float(plain.residual.double().norm()), rel=1e-9)
        target = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 0.003
        again = compiled(on).quantize_fitted(x, target, previous=fast)
        assert same(AffineQuantizer(on).quantize_fitted(x, target, previous=plain), again)


def test_compiled_quantizer_computes_its_target_with_any_number_of_threads() -> None:
    module = pytest.importorskip("loftq_cli.kernels.cpu.integer_quantizer")
    compiled = module.CompiledAffineQuantizer(grid(3, "zero point"))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 96, generator=generator) * 0.1
    found = exact_low_rank(x, 4)
    first = compiled.quantize_residual(x, x)
    wanted = compiled.quantize_residual(x, x - found.product())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert same(compiled.quantize_corrected(x, found), wanted)
        half = compiled.quantize_corrected(x, found, half=True)
        assert torch.equal(half.residual, wanted.residual.bfloat16()) and half.norm == wanted.norm
        assert torch.equal(compiled.restore(x, half.quantized), wanted.residual)
        codes = torch.empty_like(first.quantized.codes)
        scratch = compiled.quantize_corrected(x, found, scratch=Scratch(first.residual, codes))
        assert same(scratch, wanted) and scratch.residual is first.residual and scratch.quantized.codes is codes
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_loftq_alternates_on_it(kind: str) -> None:
    x = weights(96, 128)
    quantizer = block_quantizer(grid(2, kind), "cpu")
    result = loftq(x, quantizer, iters=3, low_rank=exact_step(8))
    q = dequantize(result.quantized, grid(2, kind))
    left = torch.linalg.vector_norm(x - q - result.lora_b @ result.lora_a) / torch.linalg.vector_norm(x)
    assert float(left) == pytest.approx(result.residual, rel=1e-4) and result.residual < result.plain_residual


def test_information_bits_count_codes_scales_and_zeros() -> None:
    per_weight = {kind: grid(2, kind).information_bits(4, 128) / 512 for kind in KINDS}
    assert per_weight == {
        "symmetric": 2 + 16 / 64,
        "zero point": 2 + 18 / 64,
        "float16 offset": 2 + 32 / 64,
        "float32 offset": 2 + 48 / 64,
    }
