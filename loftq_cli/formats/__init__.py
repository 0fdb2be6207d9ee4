"""Containers: one file each, found by name."""

from __future__ import annotations

from loftq_cli.errors import UsageError
from loftq_cli.formats.base import Format
from loftq_cli.formats.bnb import BnbFormat
from loftq_cli.formats.compressed_tensors import CompressedTensorsFormat
from loftq_cli.formats.dense import DenseFormat
from loftq_cli.formats.gguf.format import GgufFormat
from loftq_cli.formats.gptq import GptqFormat
from loftq_cli.formats.packed import PackedFormat

_ALL: tuple[Format, ...] = (
    PackedFormat(),
    BnbFormat(),
    GptqFormat("gptq", "gptq", stored_less=1),
    GptqFormat("gptq-v2", "gptq_v2", stored_less=0),
    CompressedTensorsFormat(),
    GgufFormat(),
    DenseFormat(),
)
FORMATS: dict[str, Format] = {item.name: item for item in _ALL}


def get_format(name: str) -> Format:
    """The container called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"there is no format '{name}': choose auto, {', '.join(FORMATS)}.")
    return FORMATS[name]
