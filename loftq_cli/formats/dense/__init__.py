"""Declaration of `dense`: the dequantized backbone in the model's own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.formats.container import UPSTREAM, Capability, Claim, Container

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

_QUANTIZES = "end_to_end/test_quantize.py::test_small_llama"


def _open() -> Format:
    from loftq_cli.formats.dense.format import DenseFormat

    return DenseFormat()


DENSE = Container(
    name="dense",
    open=_open,
    capability=Capability(
        bits=(2, 3, 4, 8),
        levels="any",
        exact=Claim("yes", _QUANTIZES),
        trains=Claim("yes, at the model's dtype", _QUANTIZES),
        serves=Claim("anything", UPSTREAM),
    ),
    pools=True,
    quantized=False,
    keeps_conv1d=True,
    float32_layers="kept",
    weight_dtype="always",
)
