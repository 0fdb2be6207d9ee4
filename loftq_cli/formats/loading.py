"""Loading of a container with transformers, for `loftq_cli.load` and for the snippet on the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Package:
    """A package that reads the container: its import name, and the extra of loftq-cli that installs it."""

    module: str
    extra: str


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of `loftq_cli.load` that matter to a container.

    Attributes:
        name: directory or Hub id.
        quantization: `quantization_config` of config.json.
        given: the caller's own `quantization_config`, which takes precedence over the file's; None if there is none.
        dtype: of config.json.
        adapter: an adapter will be attached to the backbone.
    """

    name: str
    quantization: Mapping[str, Any]
    given: Any
    dtype: Any
    adapter: bool


@dataclass(frozen=True)
class SnippetRequest:
    """The facts that the card's snippet depends on.

    Attributes:
        auto_class: transformers' class to load with.
        bits: of the first matrix.
        dtype: of the model.
    """

    auto_class: str
    bits: int
    dtype: str


@dataclass(frozen=True)
class Snippet:
    """Lines of Python that load the backbone at `path` as `backbone`.

    Attributes:
        names: what is imported from transformers besides the model class.
        lines: the loading itself.
    """

    lines: tuple[str, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loading:
    """Loading of a container that `from_pretrained` reads without help. Containers that need help override methods.

    Attributes:
        packages: needed to read it.
        before: lines of Python that the card's snippet begins with.
        layer_scales: names of the parameters in which a packed layer stores its scales; a layer that lacks them after
            loading was not in the checkpoint.
        tensor_scales: suffixes that follow the name of a weight in the names of its scales.
        skip_list: field of `quantization_config` with the layers that transformers must not replace by packed ones; ""
            if the container lists the packed layers instead.
    """

    packages: tuple[Package, ...] = ()
    before: tuple[str, ...] = ()
    layer_scales: tuple[str, ...] = ()
    tensor_scales: tuple[str, ...] = ()
    skip_list: str = ""

    def refuse(self, request: LoadRequest) -> str | None:
        """Return why it cannot be loaded as asked, as a sentence, or None."""
        return None

    def options(self, request: LoadRequest) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`; the caller's own take precedence."""
        return {}

    def finish(self, model: nn.Module) -> None:
        """Change the loaded backbone in place so that it can be trained."""

    def snippet(self, request: SnippetRequest) -> Snippet:
        """Return the card's lines that load the backbone."""
        return Snippet((f"backbone = {request.auto_class}.from_pretrained(path)",))


PLAIN = Loading()
