"""Declaration of `gguf`: one file for llama.cpp's family and transformers' `gguf_file`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.formats.container import UPSTREAM, Capability, Claim, Container
from loftq_cli.formats.loading import Loading, LoadRequest, Snippet, SnippetRequest

if TYPE_CHECKING:
    from loftq_cli.formats.base import Format

FILE, LORA_FILE = "model.gguf", "loftq_init/adapter.gguf"
BLOCK = 32  # weights that share a scale
_LOADS = "formats/gguf/test_format.py::test_transformers_and_gguf_load_exactly"


@dataclass(frozen=True)
class _Loading(Loading):
    def options(self, request: LoadRequest) -> dict[str, Any]:
        return {"gguf_file": FILE, "dtype": request.dtype}

    def snippet(self, request: SnippetRequest) -> Snippet:
        line = f'backbone = {request.auto_class}.from_pretrained(path, gguf_file="{FILE}", dtype="{request.dtype}")'
        return Snippet((line,))


def _open() -> Format:
    from loftq_cli.formats.gguf.format import GgufFormat

    return GgufFormat()


GGUF = Container(
    name="gguf",
    open=_open,
    capability=Capability(
        bits=(4, 8),
        levels="Q4_0, Q4_1 (`--asymmetric`), Q8_0; Llama, Qwen2, Qwen3",
        exact=Claim("yes", _LOADS),
        trains=Claim("yes, unpacked", _LOADS),
        serves=Claim("llama.cpp", UPSTREAM),
    ),
    needs=("peft", "gguf"),
    loading=_Loading(),
    tag="gguf",
    file=FILE,
    integers_only=True,
    group_size=BLOCK,
    symmetric=True,
    unmergeable=(
        "a GGUF backbone is for serving only: train on --format packed --bits 4 --method qa-lora --group-size 32, then "
        "merge that with --to gguf."
    ),
)
