"""Types of recipe fields that pydantic's own constraints do not cover: strings, lists, numbers and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator, ValidationInfo, WrapValidator
from pydantic.functional_validators import PlainValidator

from loftq_cli.errors import UsageError
from loftq_cli.recipe.choices import GROUP_SIZES, MIXES
from loftq_cli.recipe.rules import parse_rule, parse_size
from loftq_cli.recipe.yaml_file import check_text

_TOO_LARGE = 2**31
_SMALLEST_SHARD = 1_000  # bytes


def _valid_text(text: str, info: ValidationInfo) -> str:
    return check_text(text, str(info.field_name))


def _not_empty(text: str | None) -> str | None:
    if text == "":
        raise ValueError("empty")
    return text


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _valid_rules(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        parse_rule(text)
    return texts


def _known_mix(name: str) -> str:
    if name and name not in MIXES:
        raise ValueError("unknown")
    return name


def _known_group(size: int | None) -> int | None:
    if size is not None and size not in GROUP_SIZES:
        raise ValueError("unknown")
    return size


def _size_text(value: Any) -> Any:
    """Accept a number of bytes, which YAML reads as an int."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _valid_size(text: str | None) -> str | None:
    if text is not None:
        parse_size(text)
    return text


def _valid_shard_size(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError("no size")
    if parse_size(_valid_text(value, info) if isinstance(value, str) else str(value)) < _SMALLEST_SHARD:
        raise UsageError(f"--max-shard-size {value} is too small: give at least 1KB.")
    return value


def _path_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Text = Annotated[str, AfterValidator(_valid_text)]
NotEmpty = AfterValidator(_not_empty)
PathText = BeforeValidator(_path_text, json_schema_input_type=str | Path | None)
TextList = BeforeValidator(_as_tuple, json_schema_input_type=str | Sequence[str])
Rules = AfterValidator(_valid_rules)
KnownMix = AfterValidator(_known_mix)
KnownGroup = AfterValidator(_known_group)
SizeText = BeforeValidator(_size_text, json_schema_input_type=str | int | None)
ValidSize = AfterValidator(_valid_size)
ShardSize = PlainValidator(_valid_shard_size)
AsText = BeforeValidator(str, json_schema_input_type=str | float)  # YAML reads 3.1 as a number
# For a field whose default depends on others; the model sets it last.
UnsetIsNone = WrapValidator(lambda value, validate: None if value is None else validate(value))
Mean = Annotated[int | float | None, Ge(1), Lt(_TOO_LARGE)]
From0 = Annotated[int, Ge(0), Lt(_TOO_LARGE)]
From1 = Annotated[int, Ge(1), Lt(_TOO_LARGE)]
