"""Find the 4 or 8 of NF4's 16 levels with the least error at fitted scales: `nf4-subset` in numerics/codebooks.py.

    python scripts/study/subsets.py MODEL_DIRECTORY ...

Every subset with both ends is tried on blocks of 64 of a normal distribution and of each model's matrices.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from residuals import RESULTS, matrices

from loftq_cli.kernels import block_quantizer
from loftq_cli.numerics.grids.blocks import BlockGrid
from loftq_cli.numerics.grids.codebooks import Codebook, codebook
from loftq_cli.numerics.quantizers.protocols import FittingQuantizer

_BLOCKS = 400


def blocks_of(model: Path) -> torch.Tensor:
    """Some blocks [n, 64], drawn from all matrices."""
    every = torch.cat([w[:, : w.shape[1] // 64 * 64].reshape(-1, 64) for _, w in matrices(model)[1]])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:_BLOCKS]].contiguous()


def error(levels: tuple[float, ...], x: torch.Tensor) -> float:
    """Relative residual of fitted quantization."""
    book = Codebook("subset", (len(levels) - 1).bit_length(), levels)
    quantizer = block_quantizer(BlockGrid(book, 64, "rows", torch.float32, torch.float32), "cpu")
    assert isinstance(quantizer, FittingQuantizer)
    return quantizer.quantize_fitted(x, x).residual_norm() / float(x.norm())


def main() -> None:
    data = {"normal": torch.randn(_BLOCKS, 64, generator=torch.Generator().manual_seed(0))}
    data |= {Path(name).name: blocks_of(Path(name)) for name in sys.argv[1:]}
    nf4, out = codebook("nf", 4).levels, {}
    for bits in (2, 3):
        found = {}
        for inner in itertools.combinations(range(1, 15), 2**bits - 2):
            codes = (0, *inner, 15)
            found[codes] = {name: error(tuple(nf4[code] for code in codes), x) for name, x in data.items()}
        least = {name: min(errors[name] for errors in found.values()) for name in data}
        ranked = sorted(found, key=lambda codes: sum(found[codes][name] / least[name] for name in data))
        out[f"{bits} bits"] = {
            "best": [{"codes": codes, "error": found[codes]} for codes in ranked[:5]],
            "nf": {name: error(codebook("nf", bits).levels, x) for name, x in data.items()},
        }
    text = json.dumps(out, indent=1)
    print(text)
    (RESULTS / "subsets.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
