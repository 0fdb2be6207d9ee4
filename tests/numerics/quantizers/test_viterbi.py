"""The Viterbi algorithm: optimal where all codes can be tried, good on Gaussian numbers, and equal to its twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels.cpu import viterbi as compiled
from loftq_cli.numerics.grids.trellis import TrellisGrid, states
from loftq_cli.numerics.quantizers import viterbi

ERRORS = {2: 0.0765, 3: 0.0205, 4: 0.0055}  # of variance 1


def table(bits: int) -> Tensor:
    return TrellisGrid(bits, 10, 64, torch.float32, torch.float32).table()


def numbers(n: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, length, generator=generator), torch.rand(n, length, generator=generator) + 0.1


def cost(x: Tensor, gain: Tensor, codes: Tensor, bits: int) -> Tensor:
    return (gain * (x - table(bits)[states(codes, bits, 10).long()]).square()).sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("length", [256, 48, 16, 5, 3, 1])
def test_the_compiled_twin_finds_the_same_codes(bits: int, length: int) -> None:
    x, gain = numbers(37, length, bits)
    x[0], x[1, 0], gain[2] = 0.0, 60.0, 1e-12
    found = viterbi.encode(x, gain, table(bits), bits)
    assert found.dtype == torch.uint8 and int(found.max()) < 2**bits
    assert torch.equal(compiled.encode(x, gain, table(bits), bits), found)


def test_the_number_of_threads_changes_nothing() -> None:
    x, gain = numbers(400, 20)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(compiled.encode(x, gain, table(2), 2))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_on_gaussian_numbers(bits: int) -> None:
    x, _ = numbers(64, 256)
    codes = compiled.encode(x, torch.ones_like(x), table(bits), bits)
    assert float(cost(x, torch.ones_like(x), codes, bits).mean()) / 256 < ERRORS[bits]


def test_short_sequences_get_the_best_codes() -> None:
    x, gain = numbers(9, 3)
    found = cost(x, gain, viterbi.encode(x, gain, table(2), 2), 2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = torch.randint(0, 4, x.shape, dtype=torch.uint8, generator=generator)
        assert bool((found <= cost(x, gain, other, 2)).all())


def test_no_single_code_can_be_improved() -> None:
    """Every path is the best of those with its ends: changing one code, and with it a whole window, is worse."""
    x, gain = numbers(3, 32)
    codes = viterbi.encode(x, gain, table(2), 2)
    found = cost(x, gain, codes, 2)
    for place in range(8, 20):  # away from the ends, which a first pass chooses
        for code in range(4):
            other = codes.clone()
            other[:, place] = code
            assert bool((cost(x, gain, other, 2) >= found * (1 - 1e-5)).all())


def test_weights_of_errors_count() -> None:
    x, gain = numbers(16, 64)
    gain[:, ::2] = 100.0
    weighted = compiled.encode(x, gain, table(2), 2)
    plain = compiled.encode(x, torch.ones_like(x), table(2), 2)
    assert float(cost(x, gain, weighted, 2).sum()) < 0.9 * float(cost(x, gain, plain, 2).sum())
