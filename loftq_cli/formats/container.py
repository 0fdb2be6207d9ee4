"""Declaration of a container: everything the program knows about it before it needs torch.

Each container is a package here. Its `__init__.py` holds a `Container`, its `format.py` the code that quantizes and
encodes; `registry.py` lists them all. Nothing in this file or in a declaration imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loftq_cli.formats.loading import PLAIN, Loading

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
        bits: widths it stores.
        levels: levels it stores, in words.
        exact: the loaded backbone equals what LoftQ optimised.
        trains: PEFT can wrap the loaded backbone.
        serves: programs besides transformers that run it.
    """

    bits: tuple[int, ...]
    levels: str
    exact: Claim
    trains: Claim
    serves: Claim


@dataclass(frozen=True)
class AutoRequest:
    """The conversion that `--format auto` finds a container for.

    Attributes:
        widths: bits of the matrices that are to be quantized.
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
    """When `--format auto` takes a container: of those that fit, the one with the lowest rank."""

    rank: int
    fits: Callable[[AutoRequest], bool]


@dataclass(frozen=True)
class Container:
    """One value of `--format`.

    Attributes:
        name: the value.
        open: import and make the implementation.
        capability: its row of the capability table.
        needs: what `pip install` takes besides transformers to load it with an adapter.
        loading: how transformers loads it.
        tag: the Hub tag of its library, for the model card.
        quant_method: of `quantization_config`; "" where config.json has none.
        file: the one file that holds all weights; "" for safetensors shards.
        integers_only: it stores integers and no codebook, so that `--data-type auto` is `int`.
        group_size: of integers, where the user gives none.
        symmetric: integers are symmetric where the user does not say.
        auto: when `--format auto` takes it; None for never.
        pools: its layers train QA-LoRA adapters.
        pooled_by_peft: PEFT itself has QA-LoRA's layer for it; otherwise `loftq_cli.runtime` provides it.
        float_zeros: asymmetric integers have their zeros in float32 tensors of their own, to which `loftq merge` can
            add a QA-LoRA adapter.
        quantized: the stored weights are codes, so `loftq merge --to requantize` has something to quantize again.
        unmergeable: why `loftq merge` does not read it and what to do instead, as a sentence; "" where it does.
        keeps_conv1d: the running model keeps a Conv1D's [in, out] orientation.
        loaded_experts: what happens to quantized experts when the model is loaded, to follow "the experts are"; ""
            where they stay as they are stored.
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

    @property
    def data_type(self) -> str:
        """The levels that `--data-type auto` stands for."""
        return "int" if self.integers_only else "nf"
