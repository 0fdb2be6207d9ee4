"""The Triton quantizer of integer groups against its plain-torch twin on a CPU, bit for bit; run by `triton_cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from loftq_cli.numerics.grids.affine import AffineGrid, QuantizedGroups, Zero
from loftq_cli.numerics.lowrank.truncate import exact_low_rank
from loftq_cli.numerics.quantizers.integer import AffineQuantizer
from loftq_cli.numerics.quantizers.protocols import FusedQuantizer, QuantizeStep, Scratch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16)]  # of scales, and of products and values


def groups(zero: Zero = "none", bits: int = 4, **changes: object) -> AffineGrid:
    settings: dict = {"group_size": 32, "scale_dtype": F32, "value_dtype": F32, **changes}
    return AffineGrid(bits=bits, zero=zero, **settings)


def rows_of_all_kinds(seeded: torch.Generator) -> list[Tensor]:
    """Two rows each: random, whole numbers with many ties, zero, denormal, tiny, huge, constant, of one sign."""
    x = torch.randn(2, 50, generator=seeded)
    ties = torch.randint(-8, 8, x.shape, generator=seeded) * 0.5
    return [x, ties, 0 * x, x * 1e-41, x * 1e-30, x * 1e30, torch.full_like(x, -0.3), x.abs() + 1]


def same_groups(found: QuantizeStep, plain: QuantizeStep) -> None:
    """Do what `same` does, with `plain` from a CPU, as torch divides by numbers differently on a GPU."""
    a, b = found.quantized, plain.quantized
    assert isinstance(a, QuantizedGroups) and isinstance(b, QuantizedGroups)
    assert (a.zeros is None) == (b.zeros is None)
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (found.residual, plain.residual)]
    for left, right in pairs if a.zeros is None or b.zeros is None else [*pairs, (a.zeros, b.zeros)]:
        assert left.dtype == right.dtype and torch.equal(left.cpu(), right)
    assert found.residual_norm() == pytest.approx(plain.residual_norm(), rel=1e-6)


def groups_of(g: AffineGrid, w: Tensor, target: Tensor) -> None:
    from loftq_cli.kernels.gpu.integer_quantizer import TritonAffineQuantizer

    step = TritonAffineQuantizer(g).quantize_residual(w, target)
    same_groups(step, AffineQuantizer(g).quantize_residual(w.cpu(), target.cpu()))
    assert torch.equal(TritonAffineQuantizer(g).restore(w, step.quantized), step.residual)


def groups_refitted(g: AffineGrid, w: Tensor, target: Tensor) -> None:
    from loftq_cli.kernels.gpu.integer_quantizer import TritonAffineQuantizer

    quantizer, plain = TritonAffineQuantizer(g), AffineQuantizer(g)
    first = plain.quantize_fitted(w.cpu(), w.cpu())
    assert isinstance(quantizer, FusedQuantizer)
    step = quantizer.quantize_fitted(w, w)
    same_groups(step, first)
    again = quantizer.quantize_fitted(w, target, previous=step)
    same_groups(again, plain.quantize_fitted(w.cpu(), target.cpu(), previous=first))


def groups_corrected(g: AffineGrid, w: Tensor, half: bool) -> None:
    from loftq_cli.kernels.gpu.integer_quantizer import TritonAffineQuantizer

    quantizer, found = TritonAffineQuantizer(g), exact_low_rank(w.flip(0), 2)
    first = quantizer.quantize_corrected(w, None, half=half)
    step = quantizer.quantize_corrected(w, found, half=half, scratch=Scratch(first.residual))
    assert step.residual.data_ptr() == first.residual.data_ptr(), "the residual's memory must be reused"
    plain = AffineQuantizer(g).quantize_residual(w.cpu(), (w - found.product()).cpu())
    rounded = plain.residual.bfloat16() if half else plain.residual
    same_groups(step, QuantizeStep(plain.quantized, rounded, plain.residual_norm()))


def group_cases() -> Iterator[tuple[Callable[..., None], AffineGrid, tuple[object, ...]]]:
    """Return every check with its grid and its other arguments."""
    seeded = torch.Generator().manual_seed(0)
    for zero in ("none", "integer", "float"):
        for rule in ("absmax", "minmax"):
            for bits, (scale_dtype, value_dtype) in zip((2, 3, 4, 8, 4), DTYPES):
                kinds = {"scale_dtype": scale_dtype, "zero_dtype": value_dtype, "value_dtype": value_dtype}
                g = groups(zero, bits, scale_rule=rule, product_dtype=scale_dtype, **kinds)
                w = torch.cat(rows_of_all_kinds(seeded))
                yield groups_of, g, (w, w)
            for size, shape in [(0, (3, 70)), (128, (2, 300)), (48, (5, 100)), (64, (1, 1))]:
                w = torch.randn(shape, generator=seeded)
                yield groups_of, groups(zero, 4, group_size=size, scale_rule=rule, least_zero=1), (w, w.flip(0))
            w = torch.randn(5, 70, generator=seeded)
            yield groups_corrected, groups(zero, 4, scale_rule=rule), (w, rule == "absmax")
        for bits, size in [(2, 32), (8, 0)]:
            w = torch.randn(4, 45, generator=seeded)
            w[1] = 0.0
            w[2] = w[2].abs() + 1
            g = groups(zero, bits, group_size=size, scale_dtype=F16, zero_dtype=BF16, value_dtype=BF16)
            yield groups_of, g, (w, w + 0.1 * w.flip(1))
        yield groups_refitted, groups(zero, 2), (w, w + 0.1 * w.flip(1))
