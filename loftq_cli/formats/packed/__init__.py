"""Declaration of `packed`: the project's own storage, for any codebook and for integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli._version import REQUIREMENT
from loftq_cli.formats.container import Auto, Capability, Claim, Container
from loftq_cli.formats.loading import Loading

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

QUANT_METHOD = "loftq"
CONFIG_VERSION = 3  # 2 added integers and per-matrix levels, 3 the trellis; the lowest that has all is written
SCALE_NAMES = ("weight_absmax", "weight_scales", "weight_zeros", "weight_levels")
_QUANTIZES = "end_to_end/test_quantize.py::test_small_llama"


def _open() -> Format:
    from loftq_cli.formats.packed.format import PackedFormat

    return PackedFormat()


PACKED = Container(
    name="packed",
    open=_open,
    capability=Capability(
        bits=(2, 3, 4, 8),
        levels="any codebook, a trellis, integers with float zeros; mixed",
        exact=Claim("yes", _QUANTIZES),
        trains=Claim(
            "yes, at the stored bits", "runtime/test_linear.py::test_forward_and_gradients_equal_the_dense_layer"
        ),
        serves=Claim("transformers with `loftq_cli.runtime`", _QUANTIZES),
    ),
    needs=(REQUIREMENT,),
    loading=Loading(
        before=("import loftq_cli.runtime  # registers the packed layers with transformers",),
        layer_scales=SCALE_NAMES,
        tensor_scales=(".absmax",),  # of stacked experts
    ),
    quant_method=QUANT_METHOD,
    auto=Auto(rank=1, fits=lambda request: True),
    pools=True,
    float_zeros=True,
    loaded_experts=(
        "packed on disk and dequantized when the model is loaded, because PEFT trains stacked experts as dense "
        "parameters only: in memory they take the model's dtype."
    ),
    float32_layers="kept",
    weight_dtype="always",
)
