"""Train the tables of the trellis on Gaussian numbers and write loftq_cli/numerics/grids/trellis_table_data.py.

    python scripts/make_trellis_tables.py

A table begins as the quantiles of a Gaussian in random order (random values are what makes a bitshift trellis good:
QTIP, arXiv 2406.11235, section 3). Lloyd's algorithm then alternates: encode new Gaussian numbers, in units of their
blocks' root mean square, and move every state's value to the mean of the numbers that were given this state. Values are
rounded to multiples of 1/4096, so that they are the same everywhere. Other machines and versions of torch may end in
other tables of the same quality: outputs refer to the tables by number, so a new table needs a new number, and the old
ones must stay.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.kernels.cpu.viterbi import encode
from loftq_cli.numerics.grids.trellis import states
from loftq_cli.numerics.grids.trellis_tables import TABLE_SCALE

TARGET = Path(__file__).parents[1] / "loftq_cli" / "numerics" / "grids" / "trellis_table_data.py"
LENGTH = 256  # numbers in a sequence: a whole tile
SEQUENCES = {8: 512, 10: 1024}  # new ones in every round, by state_bits
BLOCK = 64  # numbers that share a scale
ROUNDS, LAST_ROUNDS, LAST_SHARE = 40, 12, 4  # the last rounds have more sequences, so that means have little noise
WIDTHS = ((2, 8), (2, 10), (3, 8), (3, 10), (4, 8), (4, 10))  # bits, state_bits
TEMPLATE = '''"""Tables of the trellis, trained on Gaussian numbers. Written by scripts/make_trellis_tables.py.

Mean squared error on Gaussian numbers in blocks of variance 1:
{errors}
"""

from __future__ import annotations

# 16-bit integers, little-endian, in base64, by bits and state_bits.
TABLES = {{
{tables}}}
'''


def quantiles(n: int, generator: torch.Generator) -> Tensor:
    """Return the quantiles of a Gaussian in random order."""
    places = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(places)[torch.randperm(n, generator=generator)].float()


def numbers(n: int, generator: torch.Generator) -> Tensor:
    """Return sequences of Gaussian numbers in units of their blocks' root mean square, [n, LENGTH]."""
    blocks = torch.randn(n, LENGTH // BLOCK, BLOCK, generator=generator)
    return (blocks / blocks.square().mean(dim=2, keepdim=True).sqrt()).flatten(1)


def encoded(x: Tensor, table: Tensor, bits: int) -> Tensor:
    """Return the states of encoded sequences, int64."""
    state_bits = table.numel().bit_length() - 1
    return states(encode(x, torch.ones_like(x), table, bits), bits, state_bits).long()


def train(bits: int, state_bits: int) -> tuple[Tensor, float]:
    """Return a table, int64 in units of 1 / TABLE_SCALE, and its mean squared error on other numbers."""
    generator = torch.Generator().manual_seed(bits)
    table = quantiles(2**state_bits, generator)
    for number in range(ROUNDS + LAST_ROUNDS):
        x = numbers(SEQUENCES[state_bits] * (1 if number < ROUNDS else LAST_SHARE), generator)
        found = encoded(x, table, bits).flatten()
        counts = torch.bincount(found, minlength=table.numel()).double()
        sums = torch.bincount(found, x.flatten().double(), minlength=table.numel())
        table = torch.where(counts > 0, sums / counts.clamp(min=1), table.double()).float()
    rounded = (table * TABLE_SCALE).round().long()
    table = rounded / TABLE_SCALE
    x = numbers(1024, torch.Generator().manual_seed(99))
    return rounded, float((x - table[encoded(x, table, bits)]).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    tables, errors = "", []
    for bits, state_bits in WIDTHS:
        table, error = train(bits, state_bits)
        errors.append(f"* {bits} bits, {2**state_bits} states: {error:.5f}")
        print(errors[-1], flush=True)
        text = base64.b64encode(table.to(torch.int16).numpy().astype("<i2").tobytes()).decode()
        lines = "".join(f'        "{text[i : i + 104]}"\n' for i in range(0, len(text), 104))
        tables += f"    ({bits}, {state_bits}): (\n{lines}    ),\n"
    TARGET.write_text(TEMPLATE.format(errors="\n".join(errors), tables=tables), encoding="utf-8")


if __name__ == "__main__":
    main()
