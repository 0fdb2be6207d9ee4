"""The Triton quantizer against its plain-torch twin, bit for bit; the twin is the expectation everywhere.

Run as a program it works through Triton's interpreter, which has to be asked for before Triton is imported:
In tests/, `TRITON_INTERPRET=1 python -m support.triton_cases` prints {"cases": n, "failures": [names]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loftq_cli.numerics.grids.affine import AffineGrid
from loftq_cli.numerics.grids.blocks import BlockGrid, midpoints
from loftq_cli.numerics.grids.codebooks import codebook
from loftq_cli.numerics.lowrank.truncate import exact_low_rank
from loftq_cli.numerics.quantizers.block import BlockQuantizer
from loftq_cli.numerics.quantizers.protocols import FeedingQuantizer, FusedQuantizer, QuantizeStep, Scratch, blocks_of
from support.triton_group_cases import group_cases

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOOKS = [("nf", 2), ("nf", 3), ("nf", 4), ("nf-sym", 3), ("uniform", 2), ("uniform", 4), ("uniform", 8)]
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16)]
SIZES = [32, 48, 64, 128, 256, 512, 1024, 2048, 4096]
SHAPES = [(7, 100), (8, 256), (1, 1), (3, 33), (2, 5000)]
LAYOUTS = ["rows", "flat"]

Case = tuple[str, Callable[[], None]]


def grid(data_type: str = "nf", bits: int = 2, **changes: object) -> BlockGrid:
    settings: dict = {"block_size": 64, "layout": "rows", "scale_dtype": F32, "value_dtype": F32, **changes}
    return BlockGrid(codebook(data_type, bits), **settings)


def matrices(levels: Tensor, rows: int, columns: int) -> list[Tensor]:
    """Return cases that are hard to round: ties, signed zeros, denormals, both ends of float32, mixed magnitudes."""
    g = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=g)
    ties = torch.cat([midpoints(levels), levels, torch.tensor([1.0, -1.0, 0.0, -0.0])])
    return [
        x,
        ties[torch.randint(len(ties), x.shape, generator=g)] * 0.02,
        torch.zeros_like(x),
        -torch.zeros_like(x),
        x * 1e-30,
        x * 3e-39,
        x * 1e-41,
        (x * 1e38).clamp(-3.4e38, 3.4e38),
        x * 1e5,
        torch.full_like(x, -0.3),
        x * torch.pow(10.0, torch.randint(-40, 38, x.shape, generator=g).float()),
    ]


def telling(levels: Tensor, scale: float) -> Tensor:
    """A short block [1, n] of this absmax, whose codes differ between dividing by it and multiplying with its
    reciprocal."""
    middles, absmax = midpoints(levels), torch.tensor(scale)
    divisor = absmax.clamp(min=1e-38)
    x = torch.cat([torch.nextafter(middles * divisor, torch.tensor(end)) for end in (-9.0, 9.0)] + [middles * divisor])
    differs = torch.bucketize(x / divisor, middles) != torch.bucketize(x * divisor.reciprocal(), middles)
    found = x[differs & (x.abs() <= absmax)]
    assert found.numel(), "such numbers must exist"
    return torch.cat([absmax.reshape(1), found])[:63].reshape(1, -1)


def same(found: QuantizeStep, plain: QuantizeStep) -> None:
    """Check codes, scales and residual bit for bit, and the norm up to the order of summation."""
    a, b = blocks_of(found), blocks_of(plain)
    for left, right in ((a.codes, b.codes), (a.absmax, b.absmax), (found.residual, plain.residual)):
        assert left.dtype == right.dtype and torch.equal(left, right)
    assert found.residual_norm() == pytest.approx(plain.residual_norm(), rel=1e-6)


def twins(g: BlockGrid, levels: Tensor | None = None) -> tuple[FusedQuantizer, BlockQuantizer]:
    from loftq_cli.kernels.gpu.block_quantizer import TritonQuantizer

    quantizer = TritonQuantizer(g, levels)
    assert isinstance(quantizer, FusedQuantizer) and isinstance(quantizer, FeedingQuantizer)
    return quantizer, BlockQuantizer(g, levels)


def residual_of(g: BlockGrid, w: Tensor, target: Tensor) -> None:
    quantizer, plain = twins(g)
    step = plain.quantize_residual(w, target)
    same(quantizer.quantize_residual(w, target), step)
    # Other scales, of both signs, as a fit may return them for a signed container.
    signs = torch.where(torch.arange(blocks_of(step).absmax.numel()) % 2 == 0, 1.0, -0.5).to(w.device)
    turned = replace(blocks_of(step), absmax=blocks_of(step).absmax * signs)
    assert torch.equal(quantizer.restore(w, turned), plain.restore(w, turned))


def corrected(g: BlockGrid, w: Tensor, half: bool) -> None:
    quantizer, plain = twins(g)
    found = exact_low_rank(w.flip(0), min(4, *w.shape))
    first = quantizer.quantize_corrected(w, None, half=half)
    same(first, plain.quantize_corrected(w, None, half=half))
    step = quantizer.quantize_corrected(w, found, half=half, scratch=Scratch(first.residual))
    assert step.residual.data_ptr() == first.residual.data_ptr(), "the residual's memory must be reused"
    same(step, plain.quantize_corrected(w, found, half=half))


def changing_dtype(g: BlockGrid, w: Tensor, half: bool) -> None:
    quantizer, plain = twins(g)
    found = exact_low_rank(w.flip(0), 4)
    step = quantizer.quantize_corrected(w, found, half=half)
    other = quantizer.quantize_corrected(w, found, half=not half, scratch=Scratch(step.residual))
    assert other.residual.data_ptr() != step.residual.data_ptr(), "memory of another dtype must not be reused"
    same(other, plain.quantize_corrected(w, found, half=not half))


def of_own_levels(g: BlockGrid, w: Tensor) -> None:
    levels = torch.tensor([-0.9, -0.2, 0.3, 1.0], device=w.device)
    quantizer = twins(g)[0].with_levels(levels)  # type: ignore[attr-defined]
    own = replace(g, codebook=replace(g.codebook, levels=tuple(levels.tolist())))
    step, plain = quantizer.quantize_residual(w, w), BlockQuantizer(own).quantize_residual(w, w)
    same(step, plain)
    assert blocks_of(step).levels is levels
    assert torch.equal(quantizer.restore(w, step.quantized), plain.residual)


def fitted(g: BlockGrid, w: Tensor) -> None:
    quantizer, plain = twins(g)
    column_weight = torch.linspace(0.5, 2, w.shape[1], device=w.device)
    first = plain.quantize_fitted(w, w, column_weight=column_weight)
    assert isinstance(quantizer, FeedingQuantizer)
    same(quantizer.quantize_fitted(w, w, column_weight=column_weight), first)
    same(quantizer.quantize_roughly(w, w, previous=first), plain.quantize_roughly(w, w, previous=first))
    assert torch.equal(quantizer.restore(w, first.quantized), first.residual)


def transposed(g: BlockGrid, w: Tensor) -> None:
    quantizer, plain = twins(g)
    same(quantizer.quantize_residual(w.T, w.T), plain.quantize_residual(w.T.contiguous(), w.T.contiguous()))


def cases(device: str) -> Iterator[Case]:
    """Return every case with its name."""

    def named(check: Callable[..., None], g: BlockGrid | AffineGrid, *arguments: object) -> Case:
        tensors = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
        size = "x".join(map(str, arguments[0].shape)) if isinstance(arguments[0], Tensor) else ""
        kinds = f"{g.scale_dtype} {g.value_dtype}".replace("torch.", "")
        rest = [str(x) for x in arguments if isinstance(x, bool)]
        how = g.layout if isinstance(g, BlockGrid) else f"{g.zero} {g.scale_rule}"
        name = [check.__name__, g.data_type, str(g.bits), how, str(g.block_size), kinds, size, *rest]
        return " ".join(name), lambda: check(g, *tensors)

    for layout in LAYOUTS:
        for data_type, bits in BOOKS:
            for scale_dtype, value_dtype in DTYPES:
                g = grid(data_type, bits, layout=layout, scale_dtype=scale_dtype, value_dtype=value_dtype, signed=True)
                w = torch.cat(matrices(g.levels(), 5, 70))
                yield named(residual_of, g, w, w + 0.01 * w.abs().clamp(max=1.0))
        for block_size in SIZES:
            for number, (rows, columns) in enumerate(SHAPES):
                g = grid("nf", 4, layout=layout, block_size=block_size, value_dtype=BF16)
                w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
                yield named(residual_of, g, w, w)
                yield named(corrected, g, w, (number + block_size // 32) % 2 == 0)
        for kind in matrices(grid().levels(), 3, 33):  # each with a short last block of its own
            g = grid("nf", 3, layout=layout, scale_dtype=BF16, value_dtype=F16)
            yield named(residual_of, g, kind, kind)
            yield named(transposed, g, kind)
        for scale in (1.7, 0.3, 9e-39):
            g = grid("uniform", 8, layout=layout)
            w = telling(g.levels(), scale)
            yield named(residual_of, g, w, w)
        w = torch.randn(9, 200, generator=torch.Generator().manual_seed(0))
        yield named(changing_dtype, grid("nf", 4, layout=layout), w, layout == "flat")
        yield named(of_own_levels, grid("nf", 2, layout=layout), w)
        yield named(fitted, grid("nf", 2, layout=layout, signed=True), w)
    for check, affine, arguments in group_cases():
        yield named(check, affine, *arguments)


def main() -> None:

    count, failures = 0, []
    for name, check in cases("cpu"):
        count += 1
        try:
            check()
        except Exception as error:  # to report all of them at once
            failures.append(f"{name}: {type(error).__name__} {error}"[:300])
    json.dump({"cases": count, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
