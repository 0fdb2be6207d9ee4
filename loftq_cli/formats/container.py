"""Declaration of a container: everything the program knows about it before it needs torch.

Each container is a package here. Its `__init__.py` has a `Container`, its `format.py` the code that quantizes and
encodes; `registry.py` lists them all. Neither this file nor a declaration imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loftq_cli.formats.loading import PLAIN, Loading
from loftq_cli.modules.reasons import Reason, Why

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

UPSTREAM = "upstream source"


@dataclass(frozen=True)
class Claim:
    """A cell of the capability table.

    Attributes:
        text: the claim.
        proof: the test that shows it, as `file.py::test` under `tests/`, or `UPSTREAM`.
    """

    text: str
    proof: str


@dataclass(frozen=True)
class Capability:
    """A container's row of the capability table.

    Attributes:
        bits: supported bit widths.
        levels: supported levels, as text.
        exact: the loaded backbone equals the one that LoftQ optimised.
        trains: PEFT can wrap the loaded backbone.
        serves: programs other than transformers that run it.
    """

    bits: tuple[int, ...]
    levels: str
    exact: Claim
    trains: Claim
    serves: Claim


@dataclass(frozen=True)
class AutoRequest:
    """The conversion that `--format auto` chooses a container for.

    Attributes:
        widths: bits of the matrices to quantize.
        data_type: their levels: "nf", "nf4-subset", "int", ...
        kinds: their kinds, as in `formats.base.MatrixKind`.
        rebuilt_for: values of `quant_method` for which transformers builds other modules than the checkpoint has.
    """

    widths: Collection[int]
    data_type: str
    kinds: Collection[str] = ()
    rebuilt_for: Collection[str] = ()


@dataclass(frozen=True)
class Auto:
    """When `--format auto` chooses a container: the one with the lowest rank of those that fit."""

    rank: int
    fits: Callable[[AutoRequest], bool]


@dataclass(frozen=True)
class Container:
    """One value of `--format`.

    Attributes:
        name: the value.
        open: import and create the implementation.
        capability: its row of the capability table.
        needs: packages to install besides transformers in order to load it with an adapter.
        loading: how transformers loads it.
        tag: the Hub tag of its library, for the model card.
        quant_method: of `quantization_config`; "" if config.json has none, so that transformers loads the model without
            a quantizer.
        file: the one file that contains all weights; "" for safetensors shards.
        integers_only: it stores integers and no codebook, so that `--data-type auto` is `int`.
        group_size: default group size of integers.
        symmetric: integers are symmetric by default.
        auto: when `--format auto` chooses it; None for never.
        pools: its layers train QA-LoRA adapters.
        pooled_by_peft: PEFT itself has QA-LoRA's layer for it; otherwise `loftq_cli.runtime` provides it.
        float_zeros: asymmetric integers have their zeros in separate float32 tensors, to which `loftq merge` can add a
            QA-LoRA adapter.
        quantized: the stored weights are codes, so `loftq merge --to requantize` can quantize them again.
        unmergeable: why `loftq merge` does not read it and what to do instead, as a sentence; "" if it does.
        keeps_conv1d: the running model keeps a Conv1D's [in, out] orientation.
        float32_layers: its loaded layers, where transformers keeps a layer in float32 and the rest of the model in
            another dtype: they are in float32 too ("kept"), they take the model's dtype ("cast"), or the loader never
            quantizes such a layer, whatever the dtype ("skipped").
        weight_dtype: when the `weight` of its loaded layers has the dtype of a dense weight, which some models' code
            asks for: always, if the loader unpacks the weights (`--dequantize`), or never.
        loaded_experts: what happens to quantized experts when the model is loaded, to follow "the experts are"; "" if
            they stay as they are stored.
    """

    name: str
    open: Callable[[], Format]
    capability: Capability
    needs: tuple[str, ...] = ("peft",)
    loading: Loading = PLAIN
    tag: str = ""
    quant_method: str = ""
    file: str = ""
    integers_only: bool = False
    group_size: int = 64
    symmetric: bool = False
    auto: Auto | None = None
    pools: bool = False
    pooled_by_peft: bool = False
    float_zeros: bool = False
    quantized: bool = True
    unmergeable: str = ""
    keeps_conv1d: bool = False
    loaded_experts: str = ""
    float32_layers: Literal["kept", "cast", "skipped"] = "skipped"
    weight_dtype: Literal["always", "unpacked", "never"] = "never"

    def unmet(self, needs: Sequence[Reason], *, dequantize: bool, in_float32: bool) -> Reason | None:
        """Return the first of a layer's needs (`TensorRole.needs`) that this container does not meet, or None.

        Args:
            dequantize: the loader unpacks the weights.
            in_float32: the model's dtype is one for which transformers keeps the layer in float32.
        """
        met = {
            Why.FLOAT32: self.float32_layers == "kept" or (self.float32_layers == "cast" and not in_float32),
            Why.UNQUANTIZED_READ: bool(self.quant_method) and not (self.weight_dtype == "unpacked" and dequantize),
            Why.DTYPE_READ: self.weight_dtype == "always" or (self.weight_dtype == "unpacked" and dequantize),
        }
        return next((need for need in needs if not met[need.why]), None)

    @property
    def data_type(self) -> str:
        """Return the levels that `--data-type auto` means."""
        return "int" if self.integers_only else "nf"
