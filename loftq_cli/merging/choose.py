"""Choose how to merge, and explain why another way is not possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from loftq_cli.artifacts.decode import quantized_matrix
from loftq_cli.artifacts.manifest import Manifest, MatrixRecord
from loftq_cli.errors import UsageError
from loftq_cli.formats import get_container, get_format
from loftq_cli.merging.trained_adapter import Place, TrainedAdapter
from loftq_cli.numerics.methods.qalora import lost_in_integer_zeros

WAYS = ("auto", "dense", "zeros", "gguf", "requantize")
_MEASURED = 3  # matrices suffice to measure how much of an update integer zeros lose


def choose_way(
    wanted: str,
    manifest: Manifest,
    trained: TrainedAdapter,
    places: Mapping[str, Place],
    read: Callable[[str], Tensor],
) -> str:
    """Return `dense`, `zeros`, `gguf` or `requantize`.

    Args:
        wanted: the user's choice, or `auto`.
        places: module of the backbone → its place in the adapter.
        read: returns a tensor of the backbone by name.

    Raises:
        UsageError: the way does not exist, does not suit backbone and adapter, or would lose the update.
    """
    if wanted not in WAYS:
        raise UsageError(f"--to cannot be '{wanted}': choose one of {', '.join(WAYS)}.")
    container = get_container(manifest.format)
    if wanted == "requantize" and not container.quantized:
        raise UsageError("--to requantize needs a quantized backbone, and this one is dense: use --to dense.")
    if container.unmergeable:
        raise UsageError(container.unmergeable)
    if wanted in ("dense", "requantize"):
        return wanted
    changed = [record for record in manifest.matrices if record.module in places]
    if trained.group == 1:
        if wanted == "auto":
            return "dense"
        raise UsageError(
            f"--to {wanted} is for QA-LoRA adapters: a LoRA update is not constant within groups, so use --to dense or "
            "--to requantize."
        )
    if wanted == "gguf":
        _refuse_gguf(manifest, trained)
        return wanted
    kinds = {None if record.affine is None else record.affine.zero for record in changed}
    if kinds == {"float"} and container.float_zeros and _groups_fit(trained, changed):
        return "zeros"
    if "integer" in kinds:
        raise UsageError(_lost(manifest, trained, places, changed, read))
    if wanted == "zeros":
        raise UsageError(
            "--to zeros needs a packed backbone of asymmetric integers in the adapter's groups (--method qa-lora): use "
            "--to dense."
        )
    return "dense"


def _refuse_gguf(manifest: Manifest, trained: TrainedAdapter) -> None:
    """Raise unless the backbone fits Q4_1: 4-bit codes in groups of 32 with a float16 scale and a float16 zero."""
    shapes = {
        (record.bits, record.block_size, None if record.affine is None else record.affine.zero)
        for record in manifest.matrices
    }
    if not get_container(manifest.format).float_zeros or shapes != {(4, 32, "float")} or trained.group % 32:
        raise UsageError(
            "--to gguf needs a packed backbone of 4-bit integers in groups of 32 (--bits 4 --method qa-lora "
            "--group-size 32): use --to zeros or --to dense."
        )
    dense = next((record.tensor for record in manifest.kept if record.kind == "linear"), None)
    if dense is not None:  # GGUF reorders rows of some layers, which is implemented for quantized ones only
        raise UsageError(f"--to gguf needs every linear layer quantized, and {dense} is not: use --to zeros.")


def _groups_fit(trained: TrainedAdapter, changed: list[MatrixRecord]) -> bool:
    return all(record.block_size and trained.group % record.block_size == 0 for record in changed)


def _lost(
    manifest: Manifest,
    trained: TrainedAdapter,
    places: Mapping[str, Place],
    changed: list[MatrixRecord],
    read: Callable[[str], Tensor],
) -> str:
    """Measure how much of the update integer zero points would lose, and return the message."""
    shares = []
    for record in changed[:_MEASURED]:
        matrix = quantized_matrix(record)
        compact = trained.compact(places[record.module], matrix.in_features)
        shares.append(lost_in_integer_zeros(compact, get_format(manifest.format).decode(matrix, read)))
    return (
        f"the zero points of {manifest.format} are whole numbers, so {max(shares):.0%} of this adapter's update would "
        "be rounded away: use --to dense, or train on --format packed, whose float zeros store it exactly."
    )
