"""Declaration of `bnb`: a pre-quantized bitsandbytes NF4 checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.formats.container import UPSTREAM, Auto, AutoRequest, Capability, Claim, Container
from loftq_cli.formats.loading import Loading, Package, Snippet, SnippetRequest

if TYPE_CHECKING:
    from torch import nn

    from loftq_cli.formats.base import Format

QUANT_METHOD = "bitsandbytes"
_QUANTIZES = "end_to_end/test_quantize.py::test_small_llama"
_REPACKS = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class _Loading(Loading):
    def finish(self, model: nn.Module) -> None:
        for module in model.modules():
            # One inference pass would repack the weights for AVX-512 in place, and later training would be wrong.
            if hasattr(module, _REPACKS):
                setattr(module, _REPACKS, False)

    def snippet(self, request: SnippetRequest) -> Snippet:
        lines = (
            *super().snippet(request).lines,
            "for module in backbone.modules():  # else bitsandbytes repacks them on some CPUs, and training breaks",
            f'    if hasattr(module, "{_REPACKS}"):',
            f"        module.{_REPACKS} = False",
        )
        return Snippet(lines)


def _fits_auto(request: AutoRequest) -> bool:
    """True if everything is 4-bit NF and bitsandbytes can hold every matrix."""
    return (
        set(request.widths) == {4}
        and request.data_type in ("nf", "nf4-subset")
        and not {"embedding", "expert"} & set(request.kinds)
        and QUANT_METHOD not in request.rebuilt_for
    )


def _open() -> Format:
    from loftq_cli.formats.bnb.format import BnbFormat

    return BnbFormat()


BNB = Container(
    name="bnb",
    open=_open,
    capability=Capability(
        bits=(2, 4),
        levels="`nf` (2 bits stored in 4); `--double-quant`",
        exact=Claim("yes", _QUANTIZES),
        trains=Claim("yes, at 4.5 bits", _QUANTIZES),
        serves=Claim("vLLM", UPSTREAM),
    ),
    needs=("peft", "bitsandbytes"),
    loading=_Loading(
        packages=(Package("bitsandbytes", extra="bnb"),), tensor_scales=(".absmax",), skip_list="llm_int8_skip_modules"
    ),
    tag="bitsandbytes",
    quant_method=QUANT_METHOD,
    auto=Auto(rank=0, fits=_fits_auto),
)
