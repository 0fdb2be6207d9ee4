"""Declarations of `gptq` and `gptq-v2`: integers as GPTQ loaders read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loftq_cli.formats.container import UPSTREAM, Capability, Claim, Container
from loftq_cli.formats.loading import Loading, LoadRequest, Package, Snippet, SnippetRequest

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

QUANT_METHOD = "gptq"
_LOADS = "formats/test_integer_formats.py::test_gptqmodel_loads_gptq_exactly"
_KERNEL = "auto_trainable"


@dataclass(frozen=True)
class _Loading(Loading):
    def options(self, request: LoadRequest) -> dict[str, Any]:
        """GPTQ's fastest kernel is for inference only; an adapter needs one with gradients."""
        if not request.adapter:
            return {}
        from transformers import GPTQConfig

        return {"quantization_config": GPTQConfig(bits=request.quantization["bits"], backend=_KERNEL)}

    def snippet(self, request: SnippetRequest) -> Snippet:
        lines = (
            f'kernel = GPTQConfig(bits={request.bits}, backend="{_KERNEL}")  # others are for inference only',
            f"backbone = {request.auto_class}.from_pretrained(path, quantization_config=kernel)",
        )
        return Snippet(lines, names=("GPTQConfig",))


def _open_v1() -> Format:
    from loftq_cli.formats.gptq.format import GptqFormat

    return GptqFormat("gptq", "gptq", stored_less=1)


def _open_v2() -> Format:
    from loftq_cli.formats.gptq.format import GptqFormat

    return GptqFormat("gptq-v2", "gptq_v2", stored_less=0)


GPTQ = Container(
    name="gptq",
    open=_open_v1,
    capability=Capability(
        bits=(2, 3, 4, 8),
        levels="integers, group 32 to 256 or a row",
        exact=Claim("yes", _LOADS),
        trains=Claim("yes, at the stored bits", _LOADS),
        serves=Claim("vLLM: 4 and 8 bits, `--symmetric`", UPSTREAM),
    ),
    needs=("peft", "optimum", "gptqmodel"),
    loading=_Loading(packages=(Package("optimum", extra="gptq"), Package("gptqmodel", extra="gptq"))),
    tag="gptq",
    quant_method=QUANT_METHOD,
    integers_only=True,
    pools=True,
    pooled_by_peft=True,
)

GPTQ_V2 = replace(
    GPTQ,
    name="gptq-v2",
    open=_open_v2,
    capability=replace(GPTQ.capability, levels="the same", serves=Claim("gptqmodel", UPSTREAM)),
)
