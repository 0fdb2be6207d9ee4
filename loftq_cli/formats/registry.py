"""All containers, in the order of `--format`. Add a line here for a new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loftq_cli.errors import UsageError
from loftq_cli.formats.bnb import BNB
from loftq_cli.formats.compressed_tensors import COMPRESSED_TENSORS
from loftq_cli.formats.container import AutoRequest, Container
from loftq_cli.formats.dense import DENSE
from loftq_cli.formats.gguf import GGUF
from loftq_cli.formats.gptq import GPTQ, GPTQ_V2
from loftq_cli.formats.packed import PACKED

FORMATS: Mapping[str, Container] = {
    container.name: container
    for container in (
        PACKED,
        BNB,
        GPTQ,
        GPTQ_V2,
        COMPRESSED_TENSORS,
        GGUF,
        DENSE,
    )
}


def get_container(name: str) -> Container:
    """Return the declaration of the container called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"there is no format '{name}': choose auto, {', '.join(FORMATS)}.")
    return FORMATS[name]


def container_in(folder: Path) -> Container | None:
    """Return the container whose one file is in `folder`, or None if the weights are in safetensors shards."""
    return next((item for item in FORMATS.values() if item.file and (folder / item.file).is_file()), None)


def container_of(quant_method: str) -> Container | None:
    """Return the container that writes this `quant_method` into config.json, or None if it is not one of ours."""
    return next((item for item in FORMATS.values() if item.quant_method and item.quant_method == quant_method), None)


def choose_container(request: AutoRequest) -> Container:
    """Return the container that `--format auto` chooses."""
    candidates = [(item.auto.rank, item) for item in FORMATS.values() if item.auto and item.auto.fits(request)]
    return min(candidates, key=lambda candidate: candidate[0])[1]
