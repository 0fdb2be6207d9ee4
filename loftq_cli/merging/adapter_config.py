"""Read `adapter_config.json` of a trained adapter: the fields that a merge depends on, each checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.local import check_file
from loftq_cli.errors import LoftqError
from loftq_cli.machine.patterns import full_match

CONFIG = "adapter_config.json"
_LONGEST_FILE = 10_000_000
_MOST_PATTERNS = 1_000  # that have to be compiled
_PLAIN = re.compile(r"[\w.-]*")
_LARGEST_ALPHA = 1e6
_LARGEST_NUMBER = 2**31 - 1

# Settings that change the model other than by adding B @ A to a weight.
_OTHER = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "trained biases",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "an adapter that invocation tokens switch on (aLoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "arrow_config": "a router over several adapters (Arrow)",
    "monteclora_config": "sampled factors (MonteCLoRA)",
    "kasa_config": "singular values of its own (KaSA)",
}
_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a LoRA or QA-LoRA adapter's config.

    Attributes:
        path: of the file, for messages.
        rank_pattern, alpha_pattern: regular expressions for a module's path or its end → its own value.
        group: inputs that are pooled together (QA-LoRA); 1 if none are.
        parameters: bare parameters that have factors.
        saved: modules trained as a whole.
        tokens: module → rows of its table that were trained; "" stands for the input embedding.
        task: PEFT's task type.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    group: int
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    task: str | None

    def rank_of(self, name: str) -> int:
        """Return the rank of a module by PEFT's name for it."""
        return self._matching("rank_pattern", self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        """Return lora_alpha / r, or lora_alpha / √r with rsLoRA."""
        rank = self.rank_of(name)
        alpha = self._matching("alpha_pattern", self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _matching(self, field: str, pattern: Mapping[str, Any], name: str, default: Any) -> Any:
        for key, value in pattern.items():
            if key == name or _matches(key, name, f"{field} in {self.path}"):
                return value
        return default


def _matches(key: str, name: str, where: str) -> bool:
    """True if a key of rank_pattern or alpha_pattern, which is a regular expression, matches a path or the end of one.

    Keys that are paths, of which there may be one for every matrix, are compared without compiling them. A dot in a
    regular expression is any character.
    """
    if not _PLAIN.fullmatch(key) or "\n" in name:
        return full_match(rf"(.*\.)?({key})", name, where)
    start = len(name) - len(key)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return all(one in (".", other) for one, other in zip(key, name[start:]))


def read_config(folder: Path) -> AdapterConfig:
    """Read and check the config of the adapter in `folder`.

    Raises:
        LoftqError: the file is damaged, a field has a wrong type or an impossible value, or the adapter does more than
            add B @ A to weights.
    """
    path = folder / CONFIG
    values = _read(folder)
    _check_kind(folder, values)
    fields = _Fields(path, values)
    return AdapterConfig(
        path=path,
        rank=fields.count("r", 8),
        alpha=fields.number("lora_alpha", 8),
        rank_pattern={key: fields.count(f"rank_pattern[{key}]", 0, one) for key, one in fields.pattern("rank_pattern")},
        alpha_pattern={
            key: fields.number(f"alpha_pattern[{key}]", 0, one) for key, one in fields.pattern("alpha_pattern")
        },
        rslora=fields.flag("use_rslora"),
        group=fields.count("qalora_group_size", 16) if fields.flag("use_qalora") else 1,
        parameters=fields.names("target_parameters"),
        saved=fields.names("modules_to_save"),
        tokens=fields.tokens(),
        task=values["task_type"] if isinstance(values.get("task_type"), str) else None,
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        check_file(path)
        with open(path, "rb") as file:
            content = file.read(_LONGEST_FILE + 1)
        if len(content) > _LONGEST_FILE:
            raise ValueError("it is too long")
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise LoftqError(f"{path} is damaged ({error}): save the adapter again.") from error
    if not isinstance(values, dict):
        raise LoftqError(f"{path} is damaged (it is not a JSON object): save the adapter again.")
    return values


@dataclass(frozen=True)
class _Fields:
    """Typed access to the fields of the file; null stands for the default."""

    path: Path
    values: Mapping[str, Any]

    def count(self, name: str, default: int, *given: object) -> int:
        value = self._value(name, default, *given)
        if type(value) is not int or not 1 <= value <= _LARGEST_NUMBER:
            raise self._wrong(name, "a positive integer", value)
        return value

    def number(self, name: str, default: float, *given: object) -> float:
        value = self._value(name, default, *given)
        if type(value) not in (int, float) or not abs(value) <= _LARGEST_ALPHA:  # NaN is not
            raise self._wrong(name, f"a number of at most {_LARGEST_ALPHA:g}", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name) or False
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise self._wrong(name, "a list of names", value)
        return tuple(value)

    def pattern(self, name: str) -> list[tuple[str, object]]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        where = f"{name} in {self.path}"
        patterns = [key for key in value if not _PLAIN.fullmatch(key)]
        if len(patterns) > _MOST_PATTERNS:
            raise LoftqError(f"{where} has {len(patterns)} regular expressions: leave at most {_MOST_PATTERNS}.")
        for key in patterns:
            _matches(key, "", where)  # so that no invalid one is found half-way
        return list(value.items())

    def tokens(self) -> dict[str, tuple[int, ...]]:
        name = "trainable_token_indices"
        value = self.values.get(name) or {}
        value = {"": value} if isinstance(value, list) else value
        if not isinstance(value, dict) or not all(_are_rows(one) for one in value.values()):
            raise self._wrong(name, "a list of different token numbers, or an object of such lists", value)
        return {module: tuple(one) for module, one in value.items()}

    def _value(self, name: str, default: object, *given: object) -> Any:
        """Return the value, or the default if the file lacks the field; PEFT itself never writes null for a number."""
        return given[0] if given else self.values.get(name, default)

    def _wrong(self, name: str, expected: str, value: object) -> LoftqError:
        shown = f"{value!r:.80}" if value is not None else "null"
        return LoftqError(f"{self.path} is damaged ({name} must be {expected}, not {shown}): save the adapter again.")


def _are_rows(value: object) -> bool:
    """True if a value is a list of different row numbers."""
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and len(set(value)) == len(value)


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoftqError(f"the adapter in {folder} is of PEFT's type {kind!s:.80}: loftq merges only LORA.")
    found = next((what for name, what in _OTHER.items() if config.get(name)), None)
    if found is None and config.get("bias", "none") != "none":
        found = _OTHER["lora_bias"]
    if found:
        raise LoftqError(
            f"the adapter in {folder} has {found}, which cannot be added to a weight: loftq cannot merge it."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BACKBONE):
        raise LoftqError(
            f"the adapter in {folder} was trained with init_lora_weights {start[:80]!r}, which changes the backbone "
            "too: convert it in PEFT to a plain LoRA adapter (path_initial_model_for_weight_conversion) first."
        )
