"""Change config.json where a trained adapter has another vocabulary, number of labels or head than the backbone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loftq_cli.artifacts.manifest import KeptRecord, Manifest, MatrixRecord
from loftq_cli.errors import LoftqError
from loftq_cli.merging.saved_tensors import SavedTensor

_HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_CLASS_ENDING = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")


def merged_config(
    config: Mapping[str, Any], saved: Iterable[SavedTensor], manifest: Manifest, task: str | None
) -> dict[str, Any]:
    """Return the config of the merged model, before its quantization is removed.

    Raises:
        LoftqError: the config does not tell how many rows a tensor of another size has, or the sizes contradict each
            other.
    """
    changed, saved = copy.deepcopy(dict(config)), list(saved)
    for one in saved:
        if one.before is not None and one.shape != one.before:
            _resize(changed, one.tensor, one.before[0], one.shape[0])
    _check_heads(saved, manifest)
    new = [one for one in saved if one.before is None]
    if new:
        _add_head(changed, new, task)
    return changed


def _resize(config: dict[str, Any], tensor: str, old: int, new: int) -> None:
    places = list(_vocabularies(config))
    if any(place["vocab_size"] == new for place in places):
        return  # another tensor of the same vocabulary came first
    fitting = [place for place in places if place["vocab_size"] == old]
    for place in fitting:
        place["vocab_size"] = new
    labels = config.get("id2label")
    if not fitting and isinstance(labels, dict) and len(labels) in (old, new):
        _set_labels(config, new)
    elif not fitting:
        raise LoftqError(
            f"the adapter has {new} rows of {tensor} instead of {old}, and config.json has no vocab_size or id2label "
            "of that size: give the adapter of this model."
        )


def _vocabularies(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield the config and its sections that have a vocab_size."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(section.get("vocab_size"), int):
            yield section


def _set_labels(config: dict[str, Any], count: int) -> None:
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    config.pop("num_labels", None)


def _check_heads(saved: list[SavedTensor], manifest: Manifest) -> None:
    """Raise if the embedding was resized, but not the head that goes with it."""
    resized = {one.before[0]: one for one in saved if one.before is not None and one.shape[0] != one.before[0]}
    sizes = {one.tensor: one.shape[0] for one in saved}
    records: list[MatrixRecord | KeptRecord] = [*manifest.matrices, *manifest.kept]
    for record in records:
        rows = record.shape[0] if record.kind == "head" else 0
        one = resized.get(rows)
        if one is not None and sizes.get(record.tensor, rows) != one.shape[0]:
            raise LoftqError(
                f"the adapter has {one.shape[0]} rows of {one.tensor} instead of {rows}, but does not hold "
                f"{record.tensor}: save it again with save_embedding_layers=True."
            )


def _add_head(config: dict[str, Any], new: list[SavedTensor], task: str | None) -> None:
    names = config.get("architectures")
    ending = _HEADS.get(task or "")
    if ending is None or not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise LoftqError(
            f"the adapter holds {new[0].tensor}, which the backbone does not have, and its task type {task} does not "
            "name a head for it: give the adapter of this model."
        )
    config["architectures"] = [_CLASS_ENDING.sub("", names[0]) + ending]
    rows = max(one.shape[0] for one in new if one.shape)
    if ending != _HEADS["QUESTION_ANS"] and len(config.get("id2label") or {}) != rows:
        _set_labels(config, rows)
