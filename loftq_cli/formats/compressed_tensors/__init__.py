"""Declaration of `compressed-tensors`: integers as the compressed-tensors library packs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.formats.container import UPSTREAM, Capability, Claim, Container
from loftq_cli.formats.loading import Loading, LoadRequest, Package

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

QUANT_METHOD = "compressed-tensors"
_LOADS = "formats/test_integer_formats.py::test_transformers_loads_compressed_tensors_exactly"


@dataclass(frozen=True)
class _Loading(Loading):
    def refuse(self, request: LoadRequest) -> str | None:
        """Refuse what cannot work: PEFT adapts unpacked layers only, and transformers unpacks all at one width."""
        quantization, given, name = request.quantization, request.given, request.name
        unpacked = quantization.get("dequantize", False) if given is None else getattr(given, "dequantize", False)
        groups = (quantization.get("config_groups") or {}).values()
        # Experts have their own group, which transformers looks up for them.
        several = sum(not any("experts" in target for target in group["targets"]) for group in groups) > 1
        if unpacked and several:
            return (
                f"transformers would unpack the different bit widths of {name} as if they were the same: load it "
                "packed with adapter=False, or convert with --format packed to train."
            )
        if request.adapter and not unpacked:
            argument = "quantization_config=transformers.CompressedTensorsConfig(dequantize=True)"
            return (
                f"{name} stays packed when it is loaded (--compressed), and PEFT adapts unpacked layers only: "
                + ("convert with --format packed to train" if several else f"pass {argument}")
                + ", or adapter=False for the backbone alone."
            )
        return None


def _open() -> Format:
    from loftq_cli.formats.compressed_tensors.format import CompressedTensorsFormat

    return CompressedTensorsFormat()


COMPRESSED_TENSORS = Container(
    name="compressed-tensors",
    open=_open,
    capability=Capability(
        bits=(2, 3, 4, 8),
        levels="integers, group 32 to 256 or a row; experts one by one, symmetric",
        exact=Claim("yes", _LOADS),
        trains=Claim("yes, unpacked", _LOADS),
        serves=Claim("vLLM, symmetric: 4 and 8 bits; 2 and 3 in new versions", UPSTREAM),
    ),
    needs=("peft", "compressed-tensors"),
    loading=_Loading(packages=(Package("compressed_tensors", extra="compressed-tensors"),), skip_list="ignore"),
    tag="compressed-tensors",
    quant_method=QUANT_METHOD,
    integers_only=True,
    symmetric=True,
    float32_layers="cast",
    weight_dtype="unpacked",
)
