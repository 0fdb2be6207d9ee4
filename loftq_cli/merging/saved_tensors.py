"""Find the tensors of a trained adapter that replace tensors of the backbone, wholly or row by row.

PEFT saves modules that were trained as a whole (`modules_to_save`), the embeddings of a resized vocabulary, and the
rows of trained tokens (`trainable_token_indices`) beside the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loftq_cli.artifacts.manifest import KeptRecord, Manifest, MatrixRecord
from loftq_cli.checkpoint import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.merging.places import nearest
from loftq_cli.merging.trained_adapter import TrainedAdapter

_FROZEN = ".base_layer."


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the result that the adapter holds.

    Attributes:
        tensor: its name in the backbone; a new name for a head that the backbone lacks.
        shape: in the result, as it is stored.
        key: the whole tensor in the adapter's file, or None.
        rows_key, rows: the trained rows in the file and their numbers in the table, or None and ().
        quantized: it replaces a quantized matrix.
        before: its shape in the backbone; None for a new tensor.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str | None = None
    rows_key: str | None = None
    rows: tuple[int, ...] = ()
    quantized: bool = False
    before: tuple[int, ...] | None = None

    @property
    def needs_dense(self) -> bool:
        """True if only dense weights can hold it: the backbone's tensor is quantized, of another shape or missing."""
        return self.quantized or self.shape != self.before

    def apply(self, trained: TrainedAdapter, weight: Tensor | None) -> Tensor:
        """Return the trained tensor; `weight` is the backbone's, which is needed for rows only."""
        if self.key is not None:
            weight = trained.tensor(self.key)
        assert weight is not None
        if self.rows_key is not None:
            delta = trained.tensor(self.rows_key)
            weight = weight.to(torch.promote_types(weight.dtype, delta.dtype)).clone()
            weight[list(self.rows)] = delta.to(weight.dtype)
        return weight


def find_saved(
    trained: TrainedAdapter,
    manifest: Manifest,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
) -> dict[str, SavedTensor]:
    """Map names of tensors to what replaces them. A tensor that equals the backbone's is left out.

    Args:
        tensors: of the backbone; `read` reads one.

    Raises:
        LoftqError: the adapter holds something that has no place in the backbone.
    """
    known = _known(manifest, tensors)
    _check_complete(trained, known)
    found: dict[str, SavedTensor] = {}
    missing: list[str] = []
    for name, key in trained.wholes.items():
        stored = nearest(name, tensors)
        if stored is not None and _is_unchanged(trained, key, tensors[stored], read):
            continue
        place = nearest(name, known)
        if place is None:
            missing.append(name)
            continue
        if place in found:
            raise LoftqError(f"the adapter in {trained.folder} holds {place} twice: save it again.")
        found[place] = _replacing(trained, key, known[place])
    for name in missing:
        found |= _without_place(trained, name, found)
    for module in trained.rows:
        one = _rows(trained, module, known, found)
        found[one.tensor] = one
    return found


def _known(manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> dict[str, SavedTensor]:
    """Return every tensor that can be replaced, as the source stored it."""
    records: list[MatrixRecord | KeptRecord] = [*manifest.matrices, *manifest.kept]
    experts = {record.tensor for record in records if record.expert is not None}
    experts |= {record.parameter for record in manifest.matrices if record.expert is not None}
    known = {
        name: SavedTensor(name, info.shape, info.dtype, before=info.shape)
        for name, info in tensors.items()
        if name not in experts
    }
    for record in manifest.matrices:
        if record.expert is None and record.kind != "conv1d":
            shape = record.orientation.turn_shape(record.shape)
            known[record.tensor] = SavedTensor(record.tensor, shape, torch.float32, quantized=True, before=shape)
    return known


def _check_complete(trained: TrainedAdapter, known: Mapping[str, SavedTensor]) -> None:
    """Raise if the file lacks a tensor that the config promises; PEFT lists heads that the model need not have."""
    saved = trained.config.saved
    held = {one for one in saved if any(_belongs(name, one) for name in trained.wholes)}
    lost = next((one for one in saved if one not in held and any(_belongs(name, one) for name in known)), None)
    lost = lost or (saved[0] if saved and not held else None)
    if lost is not None:
        raise LoftqError(
            f"{trained.config.path} lists {lost!r:.200} as trained as a whole (modules_to_save), but the adapter's "
            "weights do not hold it: save the adapter again."
        )
    if trained.config.tokens and not trained.rows:
        raise LoftqError(
            f"{trained.config.path} lists trained tokens (trainable_token_indices), but the adapter's weights do not "
            "hold them: save the adapter again."
        )


def _belongs(name: str, module: str) -> bool:
    """True if a parameter or module lies in a module that PEFT knows by the end of its path."""
    return f".{module}." in f".{name}."


def _is_unchanged(trained: TrainedAdapter, key: str, info: TensorInfo, read: Callable[[str], Tensor]) -> bool:
    """True if the adapter holds the backbone's tensor, perhaps rounded; PEFT saves frozen tables beside factors."""
    given = trained.infos[key]
    if given.shape != info.shape:
        return False
    return torch.equal(read(info.name).to(given.dtype), trained.tensor(key))


def _replacing(trained: TrainedAdapter, key: str, place: SavedTensor) -> SavedTensor:
    given = trained.infos[key]
    same = len(given.shape) == len(place.shape) and given.shape[1:] == place.shape[1:] and 0 not in given.shape
    if not same or given.dtype.is_floating_point != place.dtype.is_floating_point:
        raise LoftqError(
            f"the adapter's tensor {key} has dtype {given.dtype} and shape {list(given.shape)}, but {place.tensor} has "
            f"{place.dtype} and {list(place.shape)}: give the adapter of this model."
        )
    return replace(place, key=key, shape=given.shape)


def _without_place(trained: TrainedAdapter, name: str, found: Mapping[str, SavedTensor]) -> dict[str, SavedTensor]:
    """Return the tensor that the result has in addition, if any.

    A tied head is another copy of the embedding, a frozen quantized table is the backbone's, and a module trained as a
    whole can be a new head.
    """
    key = trained.wholes[name]
    info = trained.infos[key]
    twins = (one.key for one in found.values() if one.key is not None and one.shape == info.shape)
    if any(torch.equal(trained.tensor(twin), trained.tensor(key)) for twin in twins):
        return {}
    if _FROZEN in key and not info.dtype.is_floating_point:
        return {}
    module = name.rpartition(".")[0]
    if any(_belongs(module, one) for one in trained.config.saved):
        return {name: SavedTensor(name, info.shape, info.dtype, key=key)}
    raise LoftqError(
        f"the adapter in {trained.folder} holds {key!r:.200}, which has no place in the backbone: give an adapter that "
        "was trained on this backbone."
    )


def _rows(
    trained: TrainedAdapter, module: str, known: Mapping[str, SavedTensor], found: Mapping[str, SavedTensor]
) -> SavedTensor:
    key, tokens = trained.rows[module], trained.config.tokens
    named = [rows for name, rows in tokens.items() if name and (module == name or module.endswith(f".{name}"))]
    rows = named[0] if len(named) == 1 else tokens.get("")
    place = nearest(f"{module}.weight", known)
    if rows is None or place is None:
        what = "which its config does not list" if rows is None else "which is not a table of the backbone"
        raise LoftqError(
            f"the adapter in {trained.folder} holds trained rows of {module!r:.200}, {what}: give an adapter that was "
            "trained on this backbone."
        )
    before = found.get(place, known[place])
    shape = trained.infos[key].shape
    if shape != (len(rows), *before.shape[1:]) or max(rows, default=0) >= before.shape[0]:
        raise LoftqError(
            f"the adapter's rows {key} have the shape {list(shape)}, which does not fit {len(rows)} tokens of "
            f"{place} {list(before.shape)}: give the adapter of this model."
        )
    return replace(before, rows_key=key, rows=rows)
